"""Every `ddsr` command and option that the documentation names exists."""

import re
import shlex
from pathlib import Path

import click
import pytest

from flows.cli.main import cli
from tests.unit.docs.test_links import PAGES, ROOT

#: A command in a code block or a code span.
COMMAND = re.compile(r"(?:^    |`|&& |\$ )(?:\.venv/bin/)?(ddsr [a-z][^`\n]*)", re.MULTILINE)
#: These pages name commands of the past.
HISTORY = ("CHANGELOG.md",)


def commands_of(text: str) -> list[list[str]]:
    joined = text.replace("\\\n", " ")
    return [shlex.split(line.split("  #")[0].split("…")[0], comments=True) for line in COMMAND.findall(joined)]


def unknown_words(words: list[str]) -> list[str]:
    """Of a command line: a command or options that the command line does not have."""
    context = click.Context(cli)
    command = cli.get_command(context, words[1])
    if command is None:
        return [words[1]]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return [word for word in words[2:] if word.startswith("--") and word.split("=")[0] not in {*known, "--help"}]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in HISTORY], ids=lambda path: str(path.relative_to(ROOT))
)
def test_commands_of_a_page_exist(page: Path) -> None:
    wrong = [(" ".join(words), unknown) for words in commands_of(page.read_text()) if (unknown := unknown_words(words))]
    assert wrong == []


def test_an_unknown_command_and_an_unknown_option_are_noticed() -> None:
    page = "    ddsr demo --no-prefect  # right\n\nRun `ddsr destill --images x` or `ddsr gc --remove`.\n"
    assert [unknown_words(words) for words in commands_of(page)] == [[], ["destill"], ["--remove"]]
