"""Deployed on a real server, with process workers: deploying twice, stages on the GPU pool, cancelling, retrying, the UI."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.browser import Browser, chromium, field
from tests.e2e.stack import Stack, kill_quietly
from tests.helpers.commands import TINY, make_photos

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not os.environ.get("DDSR_E2E"), reason="takes many minutes on two cores: set DDSR_E2E=1"),
]
#: Up to the distilled set: SR networks are stages like the others.
SHORT = (*TINY, "sr.archs=[]")
LONG = (*SHORT, "finetune.steps=150", "finetune.checkpoint_every=5")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("stack"))
    try:
        stack.start_server()
        assert verdicts(stack.ddsr("deploy")) == {"created"}
        stack.start_worker("cpu")
        stack.start_worker("cuda", "--limit", "1")
        yield stack
    finally:
        stack.stop()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One home for all runs: what the first has built, the others find."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("photos"))


def verdicts(output: str) -> set[str]:
    """What `ddsr deploy` says of pools, limits, automations and deployments."""
    return {line.split()[0] for line in output.splitlines() if not line.startswith("Workers:")}


def parameters(photos: Path, home: Path, overrides: tuple[str, ...], **more: object) -> dict[str, object]:
    return {"images": str(photos), "home": str(home), "device": "cpu", "overrides": overrides, **more}


def test_deploying_again_changes_nothing_but_what_was_changed_by_hand(stack: Stack):
    limit = stack.answer("GET", "v2/concurrency_limits/ddsr-gpu")
    stack.answer("PATCH", f"v2/concurrency_limits/{limit['id']}", {"limit": 7})
    lines = stack.ddsr("deploy").splitlines()
    assert [line for line in lines if line.startswith("updated")] == ["updated    concurrency limit ddsr-gpu"]
    assert verdicts(stack.ddsr("deploy")) == {"unchanged"}


def set_state(stack: Stack, run: str, kind: str) -> None:
    """What the buttons of a run's page in the UI do: CANCELLING cancels it, SCHEDULED retries it."""
    name = {"CANCELLING": "Cancelling", "SCHEDULED": "AwaitingRetry"}[kind]
    answer = stack.answer("POST", f"flow_runs/{run}/set_state", {"state": {"type": kind, "name": name}})
    assert answer["status"] == "ACCEPT", answer


def wait_for_checkpoint(stack: Stack, run: str, home: Path) -> Path:
    """Wait until the run is in the midst of fine-tuning; the partial folder."""
    while not (found := [*home.glob("artifacts/finetune/*.partial/resume/checkpoint.pt")]):
        assert stack.run(run)["state_type"] in ("SCHEDULED", "PENDING", "RUNNING"), stack.log("worker-cpu")
        time.sleep(0.05)
    return found[0].parents[1]


def first_sheet(folder: Path) -> tuple[str, int]:
    """The sample sheet that fine-tuning begins with, and when it was written: later where it has begun anew."""
    sheet = min(folder.glob("samples/*.png"))
    return sheet.name, sheet.stat().st_mtime_ns


def test_gpu_stages_run_on_the_pool_and_a_cancelled_run_goes_on_inside_the_stage(stack: Stack, photos: Path, home: Path):
    run = stack.begin("distill/distill", parameters(photos, home, LONG, gpu="pool"))
    partial = wait_for_checkpoint(stack, run, home)
    set_state(stack, run, "CANCELLING")
    sent = {item["name"]: item for item in stack.filter("flow_runs") if item["parent_task_run_id"]}
    assert set(sent) == {"embeddings", "latents", "finetune"}
    assert {item["work_pool_name"] for item in sent.values()} == {"cuda"}
    assert stack.wait(run)["state_type"] == "CANCELLED"
    assert stack.wait(sent["finetune"]["id"])["state_type"] == "CANCELLED"
    ends = time.monotonic() + 60
    while stack.flow_processes():
        assert time.monotonic() < ends, "the processes of cancelled runs live on"
        time.sleep(0.3)

    begun = first_sheet(partial)
    set_state(stack, run, "SCHEDULED")
    assert stack.wait(run, "COMPLETED", "FAILED")["state_type"] == "COMPLETED", stack.log("worker-cpu")
    assert first_sheet(partial.with_suffix("")) == begun
    names = [item["name"] for item in stack.filter("flow_runs") if item["parent_task_run_id"]]
    assert sorted(names) == ["embeddings", "finetune", "finetune", "latents", "sample", "train_sr teacher"]
    tasks = stack.filter("task_runs", flow_runs={"id": {"any_": [run]}})
    assert "Cached" in {item["state_name"] for item in tasks if item["name"] == "patches"}


def test_a_killed_run_is_marked_crashed_and_goes_on_inside_the_stage(stack: Stack, photos: Path, home: Path):
    run = stack.begin("distill/distill", parameters(photos, home, (*LONG, "finetune.seed=1"), run="killed"))
    partial = wait_for_checkpoint(stack, run, home)
    assert sum(kill_quietly(pid) for pid in stack.flow_processes()) >= 1
    begun = first_sheet(partial)
    assert stack.wait(run, "COMPLETED", "FAILED", "CANCELLED")["state_type"] == "COMPLETED", stack.log("worker-cpu")
    assert {"Crashed", "AwaitingRetry"} <= set(stack.states(run))
    assert first_sheet(partial.with_suffix("")) == begun


def test_bad_input_fails_at_once_and_says_what_to_do(stack: Stack, photos: Path, tmp_path: Path):
    run = stack.begin("distill/distill", parameters(tmp_path / "nothing", tmp_path / "home", SHORT))
    ended = stack.wait(run, "FAILED", "COMPLETED")
    assert ended["state_type"] == "FAILED"
    assert ended["run_count"] == 1
    assert "nothing" in ended["state"]["message"]
    tasks = stack.filter("task_runs", flow_runs={"id": {"any_": [run]}})
    assert all(item["run_count"] <= 1 for item in tasks)


@pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine")
def test_a_run_is_started_by_the_form_and_shows_what_it_made(stack: Stack, photos: Path, home: Path, tmp_path: Path):
    deployment = stack.answer("GET", "deployments/name/distill/distill")["id"]
    with Browser(str(chromium()), tmp_path) as page:
        page.open(f"{stack.ui}/deployments/deployment/{deployment}/run")
        page.wait(f"!!{field('images')}")
        assert not page.evaluate(f"!!{field('config')}")  # 130 fields, for Python alone
        text = page.evaluate("document.body.innerText")
        assert "Values that the configuration starts from." in text
        page.type(f"{field('images')}.querySelector('textarea')", str(photos))
        page.type(f"{field('home')}.querySelector('textarea')", str(home))
        wanted = (*SHORT, "finetune.seed=2")
        for number, override in enumerate(wanted):
            page.click("Add item", within=field("overrides"))
            page.type(f"{field('overrides')}.querySelectorAll('textarea')[{number}]", override)
        page.click("Submit")
        run = page.wait(
            "[...document.querySelectorAll('a')].map(item => item.href).find(link => link.includes('/runs/flow-run/'))"
        ).rpartition("/")[2]
        ended = stack.wait(run)
        assert ended["state_type"] == "COMPLETED", ended
        assert ended["parameters"]["overrides"] == list(wanted)

        pages = {item["key"]: item for item in stack.filter("artifacts", flow_runs={"id": {"any_": [run]}})}
        assert {"ddsr-run", "ddsr-finetune", "ddsr-sample"} <= set(pages)
        page.open(f"{stack.ui}/artifacts/artifact/{pages['ddsr-finetune']['id']}")
        shown = "[...document.querySelectorAll('img')].filter(item => item.src.startsWith('data:') && item.naturalWidth)"
        page.wait(f"{shown}.length === 2")  # the sample sheet and the curves
        assert "learning_rate" in page.evaluate("document.body.innerText")
