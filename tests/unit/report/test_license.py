"""What a report says of licenses."""

from __future__ import annotations

import pytest

from ddsr_core.report.license import license_note


@pytest.mark.parametrize(
    ("base", "words"),
    [("facebook/DiT-XL-2-512", "CC-BY-NC-4.0"), ("ddsr-tiny", "model card"), (None, "does not name")],
)
def test_license_note(base: str | None, words: str) -> None:
    assert words in license_note(base)
