"""Two machines that share nothing but the server and a home on S3: one has the flows, the other the GPU stages.

Here they are two workers with a cache folder each. The S3 server is moto's.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.stack import FINAL, Stack, kill_quietly
from tests.helpers.commands import TINY, digests, distill, make_photos

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not os.environ.get("DDSR_E2E"), reason="takes many minutes on two cores: set DDSR_E2E=1"),
]
moto_server = pytest.importorskip("moto.server", reason="the S3 server of these tests comes with moto[server]")
s3fs = pytest.importorskip("s3fs", reason="homes on S3 need the extra s3")

SETTINGS = ("sr.archs=[]", "finetune.steps=150", "finetune.checkpoint_every=5")
SILENCE_S = 60


@pytest.fixture(scope="module")
def bucket() -> Iterator[dict[str, str]]:
    """The variables that lead to an S3 server with a bucket ``team``."""
    server = moto_server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    import requests

    requests.put(f"http://{host}:{port}/team", timeout=30)
    yield variables
    server.stop()


@pytest.fixture(scope="module")
def stack(bucket: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("stack"))
    stack.environment.update(bucket, DDSR_HOME="s3://team/home")  # the deployments' default home
    try:
        stack.start_server()
        stack.ddsr("deploy", "--silence", str(SILENCE_S))
        stack.restart_every_minute()
        stack.start_worker("cpu", DDSR_CACHE=cache(stack, "cpu"))
        stack.start_worker("cuda", "--limit", "1", DDSR_CACHE=cache(stack, "cuda"))
        yield stack
    finally:
        stack.stop()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("photos"))


def cache(stack: Stack, machine: str) -> str:
    return str(stack.folder / f"cache-{machine}")


def wait_for_checkpoint(stack: Stack, run: str, machine: str) -> Path:
    """Wait until a machine is in the midst of fine-tuning; the partial folder."""
    while not (found := [*Path(cache(stack, machine)).glob("*/artifacts/finetune/*.partial/resume/checkpoint.pt")]):
        assert stack.run(run)["state_type"] in ("SCHEDULED", "PENDING", "RUNNING"), stack.log("worker-cpu")
        time.sleep(0.05)
    return found[0].parents[1]


def published(bucket: dict[str, str], prefix: str) -> dict[str, str]:
    """Key -> digest of every artifact of a home on S3."""
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem(
        key=bucket["AWS_ACCESS_KEY_ID"], secret=bucket["AWS_SECRET_ACCESS_KEY"], endpoint_url=bucket["AWS_ENDPOINT_URL"]
    )
    manifests = files.glob(f"team/{prefix}/artifacts/*/*/manifest.json")
    return {path.split("/")[-2]: json.loads(files.cat_file(path))["digest"] for path in manifests}


def test_machine_of_the_gpu_stages_dies_while_a_flow_waits_and_goes_on_when_it_is_back(
    stack: Stack, bucket: dict[str, str], photos: Path, tmp_path: Path
):
    parameters = {"images": str(photos), "device": "cpu", "gpu": "pool", "overrides": (*TINY, *SETTINGS)}
    run = stack.begin("distill/distill", parameters)
    partial = wait_for_checkpoint(stack, run, "cuda")
    begun = min(partial.glob("samples/*.png")).stat().st_mtime_ns
    stack.kill("worker-cuda")
    assert [kill_quietly(pid) for pid in stack.flow_processes(DDSR_CACHE=cache(stack, "cuda"))] == [True]
    stack.start_worker("cuda", "--limit", "1", DDSR_CACHE=cache(stack, "cuda"))
    assert stack.wait(run, timeout=600)["state_type"] == "COMPLETED", stack.log("worker-cpu")
    assert stack.run(run)["run_count"] == 1  # it has waited

    sent = {item["name"]: item["id"] for item in stack.filter("flow_runs") if item["parent_task_run_id"]}
    assert set(sent) == {"embeddings", "latents", "finetune", "train_sr teacher", "sample"}
    assert "Crashed" in stack.states(sent["finetune"])
    ended = {"state": {"type": {"any_": [*FINAL]}}}
    restarts = stack.filter("flow_runs", flows={"name": {"any_": ["restart-crashed"]}}, flow_runs=ended)
    assert {item["state_type"] for item in restarts} == {"COMPLETED"}
    assert min(partial.with_suffix("").glob("samples/*.png")).stat().st_mtime_ns == begun  # it went on inside the stage
    assert not [*Path(cache(stack, "cpu")).glob("*/artifacts/finetune/*/resume")]

    options = [word for text in SETTINGS for word in ("--set", text)]
    distill(photos, tmp_path / "local", "--no-prefect", "--device", "cpu", *options)
    assert published(bucket, "home") == digests(tmp_path / "local")


def test_two_runs_that_want_the_same_artifact_at_once_build_it_once(stack: Stack, photos: Path):
    """On one machine and with one home on S3; the second waits for the first and says so."""
    overrides = (*TINY, *SETTINGS, "finetune.seed=5")
    parameters = {"images": str(photos), "home": "s3://team/twice", "device": "cpu", "overrides": overrides}
    runs = [stack.begin("distill/distill", {**parameters, "run": name}) for name in ("first", "second")]
    for run in runs:
        assert stack.wait(run)["state_type"] == "COMPLETED", stack.log("worker-cpu")
    logs = [item["message"] for item in stack.filter("logs", logs={"flow_run_id": {"any_": runs}}, limit=200)]
    verdicts = sorted(line.split(": ")[1].split(" in ")[0] for line in logs if line.startswith("finetune "))
    assert verdicts == ["built", "there already"], logs
    assert any("waiting for " in line for line in logs), logs
