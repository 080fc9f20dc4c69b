"""``python -m ddsr_core``: the command ``ddsr``. The library itself imports nothing of the command line."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

#: The folder that holds this package and `flows`.
ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Run the command line."""
    # `python -m` puts the working directory first, where a project's own package `flows` would hide that of ddsr.
    sys.path.insert(0, str(ROOT))
    importlib.import_module("flows.cli.main").main()


if __name__ == "__main__":
    main()
