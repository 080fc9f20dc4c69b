"""Write the table of stages into docs/artifacts.md: ``python -m docs.stage_table [--check]``."""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path

from ddsr_core.stages import STAGES
from ddsr_core.storage.stage import Stage

PAGE = Path(__file__).with_name("artifacts.md")
BEGIN, END = "<!-- stages: written by `python -m docs.stage_table` -->", "<!-- end of stages -->"
HEAD = "| stage | paper | module | config | inputs | GPU |\n|---|---|---|---|---|---|"


def inputs_of(stage: Stage) -> str:
    """Names of the input folders in the order of the signature, optional ones in brackets."""
    parameters = inspect.signature(stage.run).parameters.values()
    inputs = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("out", "runtime")]
    return ", ".join(f"`{p.name}`" if p.default is p.empty else f"[`{p.name}`]" for p in inputs)


def row(stage: Stage) -> str:
    """One line of the table."""
    module = inspect.getmodule(stage.run)
    assert module is not None
    cells = (
        f"`{stage.name}`", stage.section, f"`{module.__name__}`", f"`{stage.config.__name__}`", inputs_of(stage),
        "GPU" if stage.on_gpu else "",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def page_with_table(page: str) -> str:
    """The page with the current table between its two markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    table = "\n".join([HEAD, *(row(stage) for stage in STAGES.values())])
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the table is not current")
    options = parser.parse_args(arguments)
    page = PAGE.read_text()
    current = page_with_table(page)
    if options.check and current != page:
        print(f"{PAGE}: the table of stages is not current; run python -m docs.stage_table", file=sys.stderr)
        return 1
    if not options.check:
        PAGE.write_text(current)
    return 0


if __name__ == "__main__":
    sys.exit(main())
