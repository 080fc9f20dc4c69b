"""Generated and listed parts of the documentation are current."""

import re
import tomllib
from pathlib import Path
from typing import Any

from ddsr_core.stages import STAGES
from docs import stage_table

ROOT = Path(__file__).resolve().parents[3]
DOCS = ROOT / "docs"


def pages_in(entries: list[Any]) -> set[str]:
    """Files in the navigation of the site, however deep."""
    pages: set[str] = set()
    for entry in entries:
        for item in entry.values() if isinstance(entry, dict) else [entry]:
            pages |= {item} if isinstance(item, str) else pages_in(item)
    return pages


def test_the_table_of_stages_is_current() -> None:
    page = stage_table.PAGE.read_text()
    assert stage_table.page_with_table(page) == page
    assert stage_table.main(["--check"]) == 0


def test_a_table_that_is_not_current_is_noticed(tmp_path: Path, monkeypatch: Any) -> None:
    page = tmp_path / "artifacts.md"
    page.write_text(stage_table.PAGE.read_text().replace("`finetune` | II-B", "`finetune` | IV"))
    monkeypatch.setattr(stage_table, "PAGE", page)
    assert stage_table.main(["--check"]) == 1
    assert stage_table.main([]) == 0
    assert page.read_text() == (DOCS / "artifacts.md").read_text()


def test_the_files_of_every_stage_are_listed() -> None:
    files = stage_table.PAGE.read_text().split("## Files")[1].split("**What the inputs are.**")[0]
    assert re.findall(r"^\| `(\w+)` \|", files, re.MULTILINE) == list(STAGES)


def test_every_page_is_in_the_navigation() -> None:
    navigation = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]
    assert pages_in(navigation) == {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}


def test_every_room_of_the_library_has_an_api_page() -> None:
    rooms = {path.parent.name for path in (ROOT / "ddsr_core").glob("*/__init__.py")}
    shown = set(re.findall(r"^::: ddsr_core\.(\w+)$", "\n".join(p.read_text() for p in DOCS.glob("api/*.md")), re.MULTILINE))
    modules = {path.stem for path in (ROOT / "ddsr_core").glob("*.py")} - {"__init__", "__main__"}
    assert shown == rooms | modules
