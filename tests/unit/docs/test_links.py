"""Relative links and anchors in Markdown files lead somewhere, in a checkout as on the site."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGES = [
    path for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md", "docker/*.md") for path in sorted(ROOT.glob(pattern))
]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def without_code(text: str) -> str:
    """Markdown without code blocks (fenced or indented) and code spans."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`|^(?: {4}|\t).*$", "", text, flags=re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Ids of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    words = (re.sub(r"[^\w\s-]", "", re.sub(r"[`*]", "", heading).lower()) for heading in headings)
    return {re.sub(r"\s+", "-", word.strip()) for word in words}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    dead = []
    for link in LINK.findall(without_code(page.read_text())):
        target, _, anchor = link.partition("#")
        if "://" in link:
            continue
        path = (page.parent / target).resolve() if target else page
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path)):
            dead.append(link)
    assert dead == []


def test_a_dead_link_and_a_dead_anchor_are_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One thing\n\n[a](gone.md) [b](#one-thing) [c](#other) `[d](code.md)`\n\n    [e](block.md)\n")
    with pytest.raises(AssertionError, match=r"'gone\.md', '#other'"):
        test_links_of_a_page_lead_somewhere(page)
