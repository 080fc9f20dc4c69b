"""Damaged Parquet files: every row is a picture or one reason, or the file is refused with one message.

The reading happens in another process, as a damaged file could end it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddsr_core.imaging.images import encode_png

MUTATIONS = int(os.environ.get("DDSR_MUTATIONS", "2000")) // 10
SEED = int(os.environ.get("DDSR_MUTATION_SEED", "0"))
READ = """
import sys
from pathlib import Path
from ddsr_core.errors import InputError
from ddsr_core.imaging.photos import iter_photos

for file in sorted(Path(sys.argv[1]).iterdir()):
    print(file.name, flush=True)
    try:
        for photo in iter_photos(file):
            try:
                photo.read()
            except InputError as error:
                assert str(error)
    except InputError as error:
        assert str(error)
"""


def sound_files(folder: Path) -> list[bytes]:
    data = [encode_png(np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8)) for seed in range(12)]
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    rows = pa.array([{"bytes": each, "path": f"{number}.png"} for number, each in enumerate(data)], struct)
    files = []
    for compression in ("none", "zstd", "snappy"):
        for column in (rows, pa.array(data, pa.binary())):
            path = folder / "sound.parquet"
            pq.write_table(pa.table({"image": column}), path, row_group_size=4, compression=compression)
            files.append(path.read_bytes())
    return files


@pytest.mark.parametrize("part", range(2))
def test_a_mutated_parquet_file_ends_in_pictures_or_messages(tmp_path: Path, part: int) -> None:
    sound = sound_files(tmp_path)
    (tmp_path / "mutated").mkdir()
    for number in range(part, MUTATIONS, 2):
        rng = np.random.default_rng([SEED, number])
        data = bytearray(sound[number % len(sound)])
        for _ in range(rng.integers(1, 4)):
            # The footer, at the end, says where everything lies.
            at = int(rng.integers(0, len(data)) if rng.random() < 0.5 else len(data) - 1 - rng.integers(0, 400))
            match rng.integers(0, 3):
                case 0:
                    data[at] ^= 1 << int(rng.integers(0, 8))
                case 1:
                    data[at : at + 8] = rng.bytes(8)
                case _:
                    del data[at : at + int(rng.integers(1, 20))]
        (tmp_path / f"mutated/{number:05d}.parquet").write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "mutated")], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-40:] + done.stderr[-2000:]
