"""Files of weights that cannot be read."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from ddsr_core.errors import InputError
from ddsr_core.storage.weights_file import readable


@pytest.mark.parametrize("error", [struct.error("unpack requires 4 bytes"), KeyError("x"), ValueError()])
def test_any_exception_of_a_reader_becomes_a_message_with_the_file(error: Exception) -> None:
    with pytest.raises(InputError, match="cannot read weights") as caught, readable(Path("net.pth"), "bring another"):
        raise error
    assert caught.value.where == "net.pth"
    assert caught.value.fix == "bring another"
