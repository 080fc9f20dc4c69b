"""SR networks side by side, on every task runner: the same bytes as one by one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddsr_core.evaluation import EvaluateConfig
from ddsr_core.images import photo_source
from ddsr_core.sr.train import TrainSRConfig
from ddsr_core.store import InputRef
from flows.fan_out import Work, train_and_measure
from tests.integration.commands import ROOT, digests, make_photos

pytestmark = pytest.mark.slow

SCRIPT = """
import os
import sys
from pathlib import Path
from flows.prefect_settings import apply_defaults

photos, home, runner = sys.argv[1:]
apply_defaults(Path(home).parent)

from flows.networks import prefect_fan_out
from tests.integration.test_fan_out import works_of

def main():
    from prefect import flow

    @flow
    def run():
        ahead = prefect_fan_out(runner, 2)
        for begun in [ahead.begin(work) for work in works_of(Path(photos), Path(home))]:
            begun.result()

    if runner != "ray":
        return run()
    from ray.cluster_utils import Cluster  # nodes are processes of their own, each with its share
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    os.environ["RAY_ADDRESS"] = cluster.address
    run()
    cluster.shutdown()

if __name__ == "__main__":
    main()
"""


def works_of(photos: Path, home: Path) -> list[Work]:
    source = InputRef.of(photo_source(photos))
    return [
        Work(
            label=f"seed {seed}", home=str(home), device="cpu", inputs={"data": source}, tests=source,
            recipe=TrainSRConfig(arch="edsr-small", iterations=2, batch_size=2, seed=seed),
            evaluate=EvaluateConfig(lpips=False),
        )
        for seed in range(2)
    ]  # fmt: skip


@pytest.mark.parametrize("runner", ["processes", "ray"])
def test_networks_side_by_side_are_those_trained_one_by_one(runner: str, tmp_path: Path):
    if runner == "ray":
        pytest.importorskip("prefect_ray", reason="prefect-ray is not installed")
    photos = make_photos(tmp_path / "photos", 2)
    for work in works_of(photos, tmp_path / "alone"):
        train_and_measure(work)
    script = tmp_path / "side_by_side.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("PREFECT_API_URL", None)
    command = [sys.executable, str(script), str(photos), str(tmp_path / "together"), runner]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(digests(tmp_path / "alone")) == 4
    assert digests(tmp_path / "together") == digests(tmp_path / "alone")
