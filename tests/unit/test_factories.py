"""Names as ``module:attribute``."""

from __future__ import annotations

import math

import pytest

from ddsr_core.errors import ConfigError
from ddsr_core.factories import load_factory


def test_a_place_is_imported():
    assert load_factory("math:hypot", "TABLE") is math.hypot


@pytest.mark.parametrize("place", ["no_such_module:anything", "math:no_such_name", "math"])
def test_a_place_that_does_not_exist_names_the_table_and_the_place(place: str):
    with pytest.raises(ConfigError, match=f"from {place.partition(':')[0]}: ") as caught:
        load_factory(place, "TABLE")
    assert "where: TABLE" in str(caught.value)
