"""`ddsr deploy`: work pools, limits and automations on the server, then the deployments of ``deployments/prefect.yaml``.

The command is idempotent. The deployments tell workers which folder contains the flows: this checkout or, if a pool starts
containers, the folder in the image.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal
from uuid import UUID

import yaml
from prefect.automations import Automation
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import (
    GlobalConcurrencyLimitCreate,
    GlobalConcurrencyLimitUpdate,
    WorkPoolCreate,
    WorkPoolUpdate,
)
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, RunDeployment
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.exceptions import ObjectNotFound

from ddsr_core.errors import ConfigError, DdsrError
from ddsr_core.pipeline.home import home_of
from tasks.gpu_slots import GPU_SLOTS
from tasks.server import reachable

PoolType = Literal["process", "docker", "kubernetes"]
ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "deployments/prefect.yaml"
#: Folder of the flows in the image of docker/Dockerfile.
IMAGE_ROOT = "/opt/ddsr"
#: Default home in the image: the volume of the job templates of the pools.
IMAGE_HOME = "/data"
POOLS = {
    "cpu": "Flows, and the stages that need no GPU",
    "cuda": "Stages that need a GPU: fine-tuning, sampling, SR training",
}
#: Deployments of earlier versions that `FILE` no longer defines, and their entry points. A deployment of that name with
#: another entry point is somebody else's.
FORMER = {"keeper/keeper": "flows/keeper.py:keeper"}
RESTARTER = "restart-crashed/restart-crashed"
#: A run without a heartbeat for this long has crashed. It is four times PREFECT_FLOWS_HEARTBEAT_FREQUENCY of the
#: deployments, which leaves time to restart a server.
SILENCE = timedelta(seconds=120)
#: A run that a worker has taken and that has not started after this long has crashed: its machine died or cannot start it.
SLOW_START = timedelta(minutes=15)
#: In a cluster, a run may wait for a node and an 8 GB image, up to 30 minutes by the job template.
SLOW_START_IN_CLUSTER = timedelta(minutes=45)
#: Approximate memory of a run without a GPU.
BYTES_PER_RUN = 4_000_000_000
#: Events of flow runs, and the filter for runs of the deployments of ddsr.
RUNS = {"prefect.resource.id": "prefect.flow-run.*"}
TAGGED = {"prefect.resource.id": "prefect.tag.ddsr", "prefect.resource.role": "tag"}
#: Fields of a deployment that the server sets, or that change with every deployment.
OWN = {"id", "created", "updated", "status", "last_polled", "version_id", "version_info", "version", "branch", "labels"}


def deploy(gpus: int, pool_type: PoolType = "process", silence: timedelta = SILENCE) -> Iterator[tuple[str, str]]:
    """Set up the server for this checkout; yields each item and ``created``, ``updated``, ``unchanged`` or ``removed``.

    Args:
        gpus: GPU jobs at once, over all machines.
        pool_type: type of the pools that are created; existing pools keep theirs.
        silence: time without a heartbeat after which a run has crashed.

    Raises:
        ConfigError: PREFECT_API_URL is not set, or this is not a checkout.
        DdsrError: the server does not answer, or Prefect refuses a deployment.
    """
    if not FILE.is_file():
        raise ConfigError("not a checkout of ddsr", where=FILE, fix="clone the repository and run `make setup` there")
    with reachable() as client:
        for name in POOLS:
            yield f"work pool {name}", _pool(client, name, pool_type, gpus if name == "cuda" else None, runs_at_once())
        yield f"concurrency limit {GPU_SLOTS}", _limit(client, gpus)
        before = _deployments(client)
        in_containers = any(client.read_work_pool(name).type != "process" for name in POOLS)
        for name in remove_former(client, before):
            yield f"deployment {name}", "removed"
        _deploy_all(prefect_file(IMAGE_ROOT if in_containers else str(ROOT), default_home(in_containers), before))
        for name, after in sorted(_deployments(client).items()):
            was = before.get(name)
            yield f"deployment {name}", "created" if was is None else "unchanged" if was == after else "updated"
        in_cluster = any(client.read_work_pool(name).type == "kubernetes" for name in POOLS)
        slow_start = SLOW_START_IN_CLUSTER if in_cluster else SLOW_START
        for automation in automations(silence, slow_start, client.read_deployment_by_name(RESTARTER).id):
            yield f"automation {automation.name}", update_automation(client, automation)


def default_home(in_containers: bool) -> str | None:
    """Home of the deployments: ``$DDSR_HOME``; else the volume of a container's template; else ``ddsr-home``.

    The flows of a checkout run in the checkout, so their default, ``ddsr-home``, is in it (returns None). The flows of an
    installed package run in ``site-packages``, so their home is in the folder in which ``ddsr deploy`` runs.
    """
    if os.environ.get("DDSR_HOME"):
        return home_of(None)
    if in_containers:
        return IMAGE_HOME
    return None if (ROOT / "pyproject.toml").is_file() else str(Path("ddsr-home").resolve())


def runs_at_once() -> int:
    """Number of runs that fit on this machine: one per two cores and 4 GB of memory, at least one."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min((os.cpu_count() or 1) // 2, int(memory // BYTES_PER_RUN)))


def _pool(client: SyncPrefectClient, name: str, kind: PoolType, limit: int | None, first_limit: int) -> str:
    """Create a pool, or update its limit. ``first_limit``: initial limit of a pool that users may change later."""
    try:
        there = client.read_work_pool(name)
    except ObjectNotFound:
        jobs = template(client, kind, name)
        client.create_work_pool(
            WorkPoolCreate(
                name=name,
                type=kind,
                description=POOLS[name],
                concurrency_limit=limit or (first_limit if kind == "process" else None),
                base_job_template=jobs,
            )
        )
        return "created"
    if limit is None or there.concurrency_limit == limit:
        return "unchanged"
    client.update_work_pool(name, WorkPoolUpdate(concurrency_limit=limit))
    return "updated"


def template(client: SyncPrefectClient, kind: PoolType, name: str) -> dict[str, Any]:
    """The base job template of a pool: Prefect's own for processes, ours beside ``prefect.yaml`` for containers.

    Raises:
        DdsrError: the server has no template for processes.
    """
    if kind != "process":
        return dict(json.loads((FILE.parent / f"pool-{kind}-{name}.json").read_text()))
    workers = client._client.get("collections/views/aggregate-worker-metadata").json()
    found = next((types[kind] for types in workers.values() if kind in types), None)
    if found is None:
        raise DdsrError(f"this server knows no work pools of type {kind}", fix="update Prefect on the server")
    return dict(found["default_base_job_configuration"])


def _limit(client: SyncPrefectClient, gpus: int) -> str:
    try:
        there = client.read_global_concurrency_limit_by_name(GPU_SLOTS)
    except ObjectNotFound:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=GPU_SLOTS, limit=gpus))
        return "created"
    if there.limit == gpus:
        return "unchanged"
    client.update_global_concurrency_limit(GPU_SLOTS, GlobalConcurrencyLimitUpdate(limit=gpus))
    return "updated"


def automations(silence: timedelta, slow_start: timedelta, restarter: UUID) -> list[Automation]:
    """Automations that mark runs as crashed that fall silent or never start, and start `restart-crashed` at each crash.

    Args:
        silence: time without a heartbeat after which a run has crashed.
        slow_start: time after which a run that a worker has taken, but that has not started, has crashed.
        restarter: id of the deployment of `flows.restart_crashed`.
    """
    ends = {f"prefect.flow-run.{name}" for name in ("Completed", "Failed", "Cancelled", "Crashed")}
    begins, beats = "prefect.flow-run.Running", "prefect.flow-run.heartbeat"
    gone = "its process, its worker or its machine is gone"
    return [
        Automation(
            name="ddsr: a silent run has crashed",
            description="Marks a run as crashed if its heartbeats have stopped.",
            trigger=_silent(silence, after={begins, beats}, expect={begins, beats, *ends}),
            actions=[_crashed(f"no heartbeat for {silence.seconds} s: {gone}")],
        ),
        Automation(
            name="ddsr: a run that does not begin has crashed",
            description="Marks a run as crashed if a worker has taken it but it has not started.",
            trigger=_silent(slow_start, after={"prefect.flow-run.Pending"}, expect={begins, *ends}),
            actions=[_crashed(f"not started after {slow_start.seconds} s: {gone}, or cannot start it")],
        ),
        Automation(
            name="ddsr: a crashed run goes on",
            description="Starts restart-crashed, which schedules crashed runs again. Finished stages are kept.",
            trigger=EventTrigger(
                match=RUNS, match_related=TAGGED, for_each={"prefect.resource.id"}, posture=Posture.Reactive,
                expect={"prefect.flow-run.Crashed"}, threshold=1, within=timedelta(0),
            ),
            actions=[RunDeployment(deployment_id=restarter)],
        ),
    ]  # fmt: skip


def _silent(within: timedelta, after: set[str], expect: set[str]) -> EventTrigger:
    """Fires if no event of ``expect`` follows an event of ``after`` ``within`` this time, for a run of ddsr."""
    return EventTrigger(
        match=RUNS, match_related=TAGGED, for_each={"prefect.resource.id"}, posture=Posture.Proactive,
        after=after, expect=expect, threshold=1, within=within,
    )  # fmt: skip


def _crashed(message: str) -> ChangeFlowRunState:
    return ChangeFlowRunState(state=StateType.CRASHED, message=message)


def update_automation(client: SyncPrefectClient, wanted: Automation) -> str:
    """Create or update the automation of that name. Returns ``created``, ``updated`` or ``unchanged``."""
    response = client._client.post("automations/filter", json={"automations": {"name": {"any_": [wanted.name]}}})
    found = [Automation.model_validate(item) for item in response.json()]
    if not found:
        wanted.create()
        return "created"
    there = found[0]
    facts = ("description", "trigger", "actions")
    if all(_plain(getattr(there, name)) == _plain(getattr(wanted, name)) for name in facts):
        return "unchanged"
    wanted.model_copy(update={"id": there.id, "enabled": there.enabled}).update()
    return "updated"


def _plain(value: Any) -> Any:
    """A part of an automation as plain data, without the ids and the order of sets, which the server chooses."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if not hasattr(value, "model_dump"):
        return value
    plain = value.model_dump(mode="json", exclude={"id"})
    return {name: sorted(item) if isinstance(item, list) else item for name, item in plain.items()}


def _deployments(client: SyncPrefectClient) -> dict[str, dict[str, Any]]:
    """``flow/name`` -> what is deployed under it, for the deployments tagged ddsr."""
    response = client._client.post("deployments/filter", json={"deployments": {"tags": {"all_": ["ddsr"]}}})
    names = {}
    for item in response.json():
        flow = client.read_flow(item["flow_id"])
        schedules = [{k: v for k, v in s.items() if k in ("schedule", "active", "parameters")} for s in item["schedules"]]
        limit = item.get("global_concurrency_limit") or {}
        facts = {k: v for k, v in item.items() if k not in OWN and "concurrency" not in k}
        names[f"{flow.name}/{item['name']}"] = {**facts, "schedules": schedules, "limit": limit.get("limit")}
    return names


def remove_former(client: SyncPrefectClient, before: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Remove deployments that an earlier version of ddsr has made (`FORMER`); their runs stay in the history.

    Args:
        before: current deployments, as returned by `_deployments`.

    Returns:
        Their names.
    """
    former = [name for name, entrypoint in FORMER.items() if before.get(name, {}).get("entrypoint") == entrypoint]
    for name in former:
        client.delete_deployment(client.read_deployment_by_name(name).id)
    return former


def prefect_file(code: str, home: str | None, before: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The content of `FILE`, completed with paths of this machine and with settings that were changed in the UI.

    Parameters that are set on the server alone are kept. So are its schedules, unless a schedule of the file is active; an
    inactive schedule only serves as a template for the first deployment. A deployment that is paused stays paused.

    Args:
        code: folder of the flows on the machine that runs them.
        home: default of the parameter ``home``, for flows that have one; None: the default of the flow.
        before: current deployments, as returned by `_deployments`.
    """
    facts: dict[str, Any] = yaml.safe_load(FILE.read_text())
    facts["pull"] = [{"prefect.deployments.steps.set_working_directory": {"directory": code}}]
    there = {name.rpartition("/")[2]: item for name, item in before.items()}
    for item in facts["deployments"]:
        known = there.get(item["name"], {})
        if known.get("paused"):  # Prefect unpauses whatever is deployed without it
            item["paused"] = True
        ours = {"home": home} if home else {}
        wanted = {**known.get("parameters", {}), **ours, **item.get("parameters", {})}
        taken = parameters_of(item["entrypoint"])  # Prefect rejects runs with unknown parameters
        item["parameters"] = {name: value for name, value in wanted.items() if name in taken}
        kept = [
            {"active": each["active"], "parameters": each["parameters"], **each["schedule"]}
            for each in known.get("schedules", [])
        ]
        if kept and not any(each.get("active", True) for each in item.get("schedules", [])):
            item["schedules"] = kept
    return facts


def parameters_of(entrypoint: str) -> Collection[str]:
    """Names of the parameters of a flow of this checkout, ``flows/module.py:function``."""
    path, _, name = entrypoint.rpartition(":")
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    return inspect.signature(getattr(module, name).fn).parameters.keys()


def _deploy_all(facts: Mapping[str, Any]) -> None:
    with TemporaryDirectory() as folder:
        file = Path(folder) / FILE.name
        file.write_text(yaml.safe_dump(facts, sort_keys=False))
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        fix = "correct that file, or see the log of the server"
        raise DdsrError(f"Prefect refuses the deployments: {' '.join(said[-3:])}", where=FILE, fix=fix)
