"""Images, compose file and pool templates, as far as they can be checked without a container engine."""

import asyncio
import graphlib
import ipaddress
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import yaml
from prefect.utilities.templating import find_placeholders

from deployments import deploy
from deployments.deploy import FILE, IMAGE_ROOT, POOLS, parameters_of, prefect_file, template

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text().replace("\\\n", " ")
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DDSR = {name: service for name, service in SERVICES.items() if name != "database"}
SECRETS = (
    "POSTGRES_PASSWORD",
    "PREFECT_SERVER_DATABASE_PASSWORD",
    "PREFECT_SERVER_API_AUTH_STRING",
    "PREFECT_API_AUTH_STRING",
)
#: A client that is not asked: no block and no variable stands in the templates.
NOBODY: Any = MagicMock()
#: Of the templates for GPUs only.
GPU_VARIABLES = {"docker": "device_requests", "kubernetes": "gpus"}


def instructions(name: str) -> list[str]:
    return [line.split(maxsplit=1)[1] for line in DOCKERFILE.splitlines() if line.startswith(f"{name} ")]


def test_base_images_are_pinned():
    stages = {words[2] for words in (line.split() for line in instructions("FROM"))}
    outside = [words.split()[0] for words in instructions("FROM") if words.split()[0] not in stages]
    outside.append(SERVICES["database"]["image"])
    assert {"cpu", "cuda"} <= stages
    assert all(re.fullmatch(r"[a-z]+:\d+\.\d+(\.\d+)?-[a-z-]+", image) for image in outside), outside


def test_copied_files_exist_and_are_in_the_build_context():
    included = {
        line[1:] for line in (ROOT / "docker/Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    }
    copied = [name for line in instructions("COPY") if not line.startswith("--from") for name in shlex.split(line)[:-1]]
    assert copied
    assert {name for name in copied if not (ROOT / name).exists()} == set()
    assert set(copied) == included


def test_images_and_pods_run_as_the_user_that_the_image_creates():
    uid = re.search(r"useradd --uid (\d+)", DOCKERFILE)
    assert uid is not None
    user = f"{uid[1]}:{uid[1]}"
    for target in ("cpu", "cuda"):
        stage = DOCKERFILE.split(f" AS {target}\n")[1].split("\nFROM ")[0]
        assert re.findall(r"^USER (.+)$", stage, re.MULTILINE)[-1] == user
    for pool in POOLS:
        assert template(NOBODY, "docker", pool)["job_configuration"]["container_create_kwargs"]["user"] == user
        pod = template(NOBODY, "kubernetes", pool)["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
        assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["fsGroup"]) == (int(uid[1]), int(uid[1]))


def test_the_flows_are_where_deployments_say():
    assert instructions("WORKDIR") == [IMAGE_ROOT]
    assert not instructions("ENTRYPOINT")  # Prefect's workers start the image with a command of their own


def test_workers_poll_the_pools_of_the_deployments():
    commands = [json.loads(line) for line in instructions("CMD")]
    polled = {command[command.index("--pool") + 1] for command in commands}
    assert all("--with-healthcheck" in command for command in commands)
    deployed = {item["work_pool"]["name"] for item in yaml.safe_load(FILE.read_text())["deployments"]}
    assert polled == deployed == set(POOLS)


def test_published_ports_are_bound_to_loopback_by_default():
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    hosts = [re.sub(r"\$\{[A-Z_]+:-([^}]*)\}", r"\1", port).rsplit(":", 2)[0] for port in published]
    assert hosts
    assert all(ipaddress.ip_address(host).is_loopback for host in hosts), published


def test_secrets_come_from_the_environment_and_are_asked_for():
    values = [value for service in SERVICES.values() for key, value in service["environment"].items() if key in SECRETS]
    assert len(values) == 6
    assert all(re.fullmatch(r"\$\{DDSR_[A-Z_]+:\?[^}]*docker/\.env\.example\}", value) for value in values), values
    given = re.findall(r"^#?([A-Z_]+)=(.*)$", (ROOT / "docker/.env.example").read_text(), re.MULTILINE)
    asked = set(re.findall(r"\$\{([A-Z_]+)", (ROOT / "docker/compose.yaml").read_text()))
    passed_on = {key for service in DDSR.values() for key, value in service["environment"].items() if value is None}
    assert {name for name, _ in given} == asked | passed_on
    assert {name for name, value in given if value and ("AUTH" in name or "PASSWORD" in name or "KEY" in name)} == set()
    assert "/docker/.env" in (ROOT / ".gitignore").read_text().splitlines()


def has_healthcheck(service: dict[str, Any]) -> bool:
    """From the compose file, or for images of ours from the Dockerfile."""
    check = service.get("healthcheck", {"test": instructions("HEALTHCHECK")} if "build" in service else {})
    return bool(check.get("test")) and not check.get("disable")


def test_services_wait_for_what_can_become_healthy_or_ends():
    waits = {name: service["depends_on"] for name, service in DDSR.items()}
    for name, dependencies in waits.items():
        for other, how in dependencies.items():
            ends = SERVICES[other].get("restart", "").startswith("on-failure")
            assert how["condition"] == ("service_completed_successfully" if ends else "service_healthy"), (name, other)
            assert ends or has_healthcheck(SERVICES[other]), (name, other)
    graphlib.TopologicalSorter(waits).prepare()  # raises on a circle


def test_gpus_are_reserved_by_services_of_the_gpu_profile_alone():
    reserving = {
        name for name, service in SERVICES.items()
        if any("gpu" in device["capabilities"] for device in
               service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", []))
    }  # fmt: skip
    assert reserving == {name for name, service in SERVICES.items() if "gpu" in service.get("profiles", [])}
    assert reserving == {name for name, service in DDSR.items() if service["build"]["target"] == "cuda"}


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
@pytest.mark.parametrize("pool", ["cpu", "cuda"])
def test_every_variable_of_a_template_is_used(kind: Any, pool: str):
    jobs = template(NOBODY, kind, pool)
    used = {found.name for found in find_placeholders(jobs["job_configuration"])}
    assert used == set(jobs["variables"]["properties"])
    assert jobs["variables"]["properties"]["image"]["default"] == f"ddsr:{pool}"


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_templates_differ_in_the_gpu_alone(kind: Any):
    properties = {pool: template(NOBODY, kind, pool)["variables"]["properties"] for pool in POOLS}
    gpu = GPU_VARIABLES[kind]
    assert set(properties["cuda"]) - set(properties["cpu"]) == {gpu}
    same = set(properties["cpu"]) - {"image", "tolerations"}
    assert {name for name in same if properties["cpu"][name] != properties["cuda"][name]} == set()
    assert properties["cuda"][gpu]["default"] in (1, [{"driver": "nvidia", "count": 1, "capabilities": [["gpu"]]}])


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
@pytest.mark.parametrize("pool", ["cpu", "cuda"])
def test_folders_of_runs_are_those_of_the_image_not_of_the_worker(kind: Any, pool: str):
    """A worker passes its Prefect settings on to runs, and its PREFECT_HOME is no folder of the container."""
    environment = template(NOBODY, kind, pool)["variables"]["properties"]["env"]["default"]
    results = "PREFECT_RESULTS_LOCAL_STORAGE_PATH"
    assert f"{results}={environment[results]} " in DOCKERFILE
    assert Path(environment[results]).is_relative_to(instructions("VOLUME")[0])
    assert Path(environment["PREFECT_HOME"]).is_relative_to("/home/ddsr")  # made by useradd --create-home ... ddsr
    assert re.search(r"useradd .*--create-home .*\bddsr$", DOCKERFILE, re.MULTILINE)


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_workers_of_prefect_take_the_templates(kind: Any):
    module = pytest.importorskip(f"prefect_{kind}.worker", reason=f"needs the package prefect-{kind}")
    worker = {"docker": "DockerWorkerJobConfiguration", "kubernetes": "KubernetesWorkerJobConfiguration"}[kind]
    for pool in POOLS:
        made = asyncio.run(getattr(module, worker).from_template_and_values(template(NOBODY, kind, pool), {}, NOBODY))
        if kind == "docker":
            assert made.container_create_kwargs["user"] == "1000:1000"
            assert ("device_requests" in made.container_create_kwargs) == (pool == "cuda")
        else:
            pod = made.job_manifest["spec"]["template"]["spec"]
            assert pod["securityContext"]["runAsNonRoot"]
            assert pod["containers"][0]["resources"]["limits"] == ({"nvidia.com/gpu": 1} if pool == "cuda" else {})


def test_deploying_keeps_what_was_set_in_the_ui():
    cron = {"cron": "30 2 * * *", "timezone": "Europe/Rome", "day_or": True}
    known = {"nightly/nightly": {"parameters": {"images": "/p", "home": "/old"}, "schedules": [
        {"schedule": cron, "active": True, "parameters": {}}]}}  # fmt: skip
    facts = prefect_file(IMAGE_ROOT, "/data", known)
    items = {item["name"]: item for item in facts["deployments"]}
    assert items["nightly"]["parameters"] == {"images": "/p", "home": "/data"}
    assert items["nightly"]["schedules"] == [{"active": True, "parameters": {}, **cron}]
    assert items["distill"]["parameters"] == {"home": "/data"}
    for item in items.values():  # Prefect begins no run with a parameter that its flow does not have
        assert item["parameters"].keys() <= parameters_of(item["entrypoint"]), item["name"]
    assert items["restart-crashed"]["parameters"] == {}
    assert facts["pull"] == [{"prefect.deployments.steps.set_working_directory": {"directory": IMAGE_ROOT}}]


def test_deploying_removes_what_earlier_versions_made_and_nothing_else():
    class Client:
        def __init__(self) -> None:
            self.removed: list[str] = []

        def read_deployment_by_name(self, name: str) -> SimpleNamespace:
            return SimpleNamespace(id=name)

        def delete_deployment(self, name: str) -> None:
            self.removed.append(name)

    client = Client()
    ours = {"keeper/keeper": {"entrypoint": "flows/keeper.py:keeper"}}
    theirs = {"keeper/keeper": {"entrypoint": "my/zoo.py:keeper"}, "mine/mine": {"entrypoint": "flows/keeper.py:keeper"}}
    assert deploy.remove_former(client, theirs) == []  # type: ignore[arg-type]
    assert deploy.remove_former(client, {"mine/mine": theirs["mine/mine"], **ours}) == ["keeper/keeper"]  # type: ignore[arg-type]
    assert client.removed == ["keeper/keeper"]
    names = {item["name"] for item in yaml.safe_load(FILE.read_text())["deployments"]}
    assert not names & {name.partition("/")[2] for name in deploy.FORMER}


def test_a_first_deploying_takes_the_file():
    items = {item["name"]: item for item in prefect_file("/checkout", None, {})["deployments"]}
    assert [schedule["active"] for schedule in items["nightly"]["schedules"]] == [False]
    assert items["distill"]["parameters"] == {}


def test_flows_of_an_installed_package_keep_results_out_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DDSR_HOME", raising=False)
    assert deploy.default_home(in_containers=False) is None  # a checkout
    monkeypatch.setattr(deploy, "ROOT", tmp_path / "site-packages")
    monkeypatch.chdir(tmp_path)
    assert deploy.default_home(in_containers=False) == str(tmp_path / "ddsr-home")
    assert deploy.default_home(in_containers=True) == deploy.IMAGE_HOME
    monkeypatch.setenv("DDSR_HOME", "s3://bucket/prefix")
    assert deploy.default_home(in_containers=True) == "s3://bucket/prefix"


def test_a_deployment_that_is_paused_stays_paused():
    known = {"nightly/nightly": {"paused": True}, "distill/distill": {"paused": False}}
    items = {item["name"]: item for item in prefect_file("/checkout", None, known)["deployments"]}
    assert items["nightly"]["paused"] is True
    assert not items["distill"].get("paused")
