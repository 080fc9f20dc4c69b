"""Ray, on a cluster of two nodes: processes of their own, each with one core to give away."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ddsr_core.errors import ConfigError
from tests.helpers.commands import ROOT, digests, make_photos
from tests.helpers.side_by_side import MEETING, build_here, run_on

pytestmark = pytest.mark.slow
pytest.importorskip("prefect_ray", reason="prefect-ray is not installed")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of the cluster; its workers know the folder that networks meet in."""
    import ray
    from ray.cluster_utils import Cluster

    (tmp_path / "meeting").mkdir()
    for name, value in {"PYTHONPATH": ROOT, MEETING: tmp_path / "meeting", "RAY_USAGE_STATS_ENABLED": 0}.items():
        monkeypatch.setenv(name, str(value))
    node = {"num_cpus": 1, "object_store_memory": 100_000_000}
    nodes = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        nodes.add_node(**node)
        yield nodes.address
    finally:
        ray.shutdown()  # whatever in this process has connected: a node that is connected to cannot be removed
        nodes.shutdown()


def test_two_nodes_make_what_is_built_one_by_one(cluster: str, tmp_path: Path):
    photos = make_photos(tmp_path / "photos")
    done = run_on(photos, tmp_path, "ray", RAY_ADDRESS=cluster)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "ray [2, 2] [16, 16, 16, 2]" in done.stdout
    assert len(list((tmp_path / "meeting").iterdir())) == 2  # the networks were trained on both nodes at once
    assert digests(tmp_path / "ray") == build_here(photos, tmp_path / "alone")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no Ray cluster answers"),
        ("ray://127.0.0.1:1", "no Ray cluster answers"),
        ("no.such.host.invalid:6379", "no Ray cluster answers"),
        ("somewhere", "not the address of a Ray cluster"),
        ("127.0.0.1:port", "not the address of a Ray cluster"),
    ],
)
def test_a_wrong_address_is_said_at_once(address: str, message: str, monkeypatch: pytest.MonkeyPatch):
    from tasks.task_runners import task_runner

    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=message) as caught:
        task_runner("ray", 2)
    assert caught.value.where == f"RAY_ADDRESS={address}"
