"""Build both images without a container engine, and run in them what ``docker/compose.yaml`` runs, up to a finished run.

    python -m tests.containers.check --folder /var/tmp/ddsr-containers

Debian's ``mmdebstrap`` makes the base that the Dockerfile names (with Debian's own Python 3.11), and ``buildah`` builds and
runs without a daemon, with the isolation of a chroot. Database, server, `ddsr deploy` and the worker for CPUs are started
with the commands, variables, users and volumes of the compose file; the worker then distills a few pictures at toy size. The
image for GPUs is built, and its commands are started.

Needs root, the packages ``buildah`` and ``mmdebstrap``, 40 GB of disk, the package registry, and the ports 4200, 5432 and
8080 of 127.0.0.1, because a chroot has no network of its own. Not covered: what only an engine does (networks, restarts,
``security_opt``, GPUs) and the image of PostgreSQL: Debian's is used.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.commands import ROOT, TINY, make_photos

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
DOCKERFILE = ROOT / "docker/Dockerfile"
#: What the base image of the Dockerfile offers.
BASE_PACKAGES = ("python3", "python3-venv", "python3-pip", "python-is-python3", "ca-certificates")
VARIABLES = {"DDSR_PREFECT_AUTH": "ddsr:not-a-secret", "DDSR_DATABASE_PASSWORD": "not-a-secret", "DDSR_PHOTOS": "/photos"}
PORTS = (4200, 5432, 8080)
USER = 1000
#: The certificates of this machine, for networks that have their own.
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
START_S, RUN_S = 300, 1200


class Buildah:
    """Buildah with its storage in a folder.

    Args:
        folder: for images, containers, logs, the volume ``home`` and photos.
        driver: of the storage. ``vfs`` works everywhere, but copies every layer.
    """

    def __init__(self, folder: Path, driver: str) -> None:
        self.folder = folder
        self.options = ["--root", str(folder / "storage"), "--runroot", str(folder / "run"), "--storage-driver", driver]
        self.environment = {**os.environ, "BUILDAH_ISOLATION": "chroot"}
        self.hosts = folder / "hosts"
        self.hosts.write_text("127.0.0.1 localhost " + " ".join(COMPOSE["services"]) + "\n")

    def __call__(self, command: str, *arguments: str) -> str:
        words = ["buildah", *self.options[:4], *self.options[4:], command, *arguments]
        done = subprocess.run(words, env=self.environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout.strip()

    def words(self, container: str, command: list[str], environment: Mapping[str, str], *options: str) -> list[str]:
        """A command in a container, in the container's own folder and as its user, without capabilities."""
        variables = [f"--env={name}={value}" for name, value in environment.items()]
        mounts = [f"--volume={self.hosts}:/etc/hosts:ro"]
        return ["buildah", *self.options, "run", *mounts, *variables, *options, container, "--", *command]

    def has(self, image: str) -> bool:
        return bool(self("images", "--quiet", "--filter", f"reference={image}"))


def build_base(buildah: Buildah) -> str:
    """The image that the Dockerfile begins with; its name."""
    name = re.search(r"^FROM (\S+) AS deps$", DOCKERFILE.read_text(), re.MULTILINE)
    assert name is not None
    image, archive = f"docker.io/library/{name[1]}", buildah.folder / "base.tar"
    if not archive.exists():
        words = ["mmdebstrap", "--variant=minbase", f"--include={','.join(BASE_PACKAGES)}", "bookworm"]
        subprocess.run([*words, str(archive.with_suffix(".part.tar"))], check=True)
        archive.with_suffix(".part.tar").rename(archive)
    if not buildah.has(image):
        container = buildah("from", "scratch")
        subprocess.run(["tar", "-xf", str(archive), "-C", buildah("mount", container)], check=True)
        buildah("unmount", container)
        buildah("commit", "--rm", container, image)
    return image


def build_images(buildah: Buildah) -> None:
    """The targets ``cpu`` and ``cuda``."""
    more = [f"--volume={CERTIFICATES}:{CERTIFICATES}:ro", f"--env=SSL_CERT_FILE={CERTIFICATES}"]
    for target in ("cpu", "cuda"):
        begun = time.monotonic()
        buildah(
            "bud", "--layers", "--format=docker", "--pull=never", f"--file={DOCKERFILE}",
            f"--ignorefile={DOCKERFILE}.dockerignore", f"--target={target}", f"--tag=ddsr:{target}", *more, ".",
        )  # fmt: skip
        print(f"ddsr:{target} built in {time.monotonic() - begun:.0f} s", flush=True)


def build_database(buildah: Buildah, base: str) -> None:
    """Debian's PostgreSQL in place of the image that the compose file names."""
    if buildah.has("localhost/database"):
        return
    container = buildah("from", "--pull-never", base)
    install = "apt-get update -qq && apt-get install -y -qq --no-install-recommends postgresql"
    subprocess.run(buildah.words(container, ["sh", "-c", install], {"DEBIAN_FRONTEND": "noninteractive"}), check=True)
    buildah("commit", "--rm", container, "localhost/database")


def filled(text: str) -> str:
    """A value of the compose file with its variables.

    >>> filled("${DDSR_GPUS:-1} of ${DDSR_PHOTOS:?missing}")
    '1 of /photos'
    """

    def value(match: re.Match[str]) -> str:
        return VARIABLES.get(match["name"]) or match["default"] or ""

    return re.sub(r"\$\{(?P<name>\w+)(?::-(?P<default>[^}]*)|:\?[^}]*)?\}", value, text)


class Services:
    """The services of the compose file as processes of this machine.

    Each process has a container of its own: when one ends, buildah removes what it had mounted, from its container's others,
    too.
    """

    def __init__(self, buildah: Buildah, photos: Path) -> None:
        self.buildah, self.photos, self.home = buildah, photos, buildah.folder / "home"
        shutil.rmtree(self.home, ignore_errors=True)
        self.home.mkdir()
        os.chown(self.home, USER, USER)

    def words(self, name: str, container: str, command: list[str] | None = None) -> list[str]:
        """The command of a service, or another one with its variables and volumes."""
        service = COMPOSE["services"][name]
        given = {key: filled(str(value)) for key, value in service["environment"].items() if value is not None}
        volumes = [f"--volume={self.home}:/data", f"--volume={self.photos}:/photos:ro"] if "volumes" in service else []
        chosen = command or service.get("command") or self.command_of(container)
        return self.buildah.words(container, [filled(word) for word in chosen], given, *volumes, "--cap-drop=all")

    def command_of(self, container: str) -> list[str]:
        """The command of the image."""
        command: list[str] = json.loads(self.buildah("inspect", container))["OCIv1"]["config"]["Cmd"]
        return command

    def container(self, image: str) -> str:
        return self.buildah("from", "--pull-never", image)

    @contextmanager
    def started(self, name: str, image: str) -> Iterator[None]:
        """A service, started and healthy."""
        container, tested, service = self.container(image), self.container(image), COMPOSE["services"][name]
        with process(self.words(name, container), self.buildah.folder / f"{name}.log") as running:
            test = service["healthcheck"]["test"] if "healthcheck" in service else image_health(self.buildah, container)
            self.wait(name, self.words(name, tested, test[1:]), running)
            print(f"{name}: healthy", flush=True)
            yield

    def wait(self, name: str, test: list[str], running: subprocess.Popen[bytes]) -> None:
        """Until the health check of a service succeeds."""
        ends, log = time.monotonic() + START_S, self.buildah.folder / f"{name}.log"
        while subprocess.run(test, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode:
            if running.poll() is not None or time.monotonic() > ends:
                raise SystemExit(f"{name} did not become healthy:\n{log.read_text(errors='replace')[-4000:]}")
            time.sleep(2)

    def once(self, name: str, image: str, command: list[str] | None = None) -> None:
        """A service, or another command with its variables, that ends by itself."""
        words = self.words(name, self.container(image), command)
        subprocess.run(words, check=True, timeout=RUN_S)


def image_health(buildah: Buildah, container: str) -> list[str]:
    """The health check of an image: ``["CMD", ...]``."""
    test: list[str] = json.loads(buildah("inspect", container))["Docker"]["config"]["Healthcheck"]["Test"]
    return test


@contextmanager
def process(words: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, which ends with all that it has started."""
    with log.open("wb") as output:
        running = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield running
    finally:
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(running.pid, sign)
                running.wait(40)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass


@contextmanager
def database(services: Services) -> Iterator[None]:
    """PostgreSQL with the user, the database and the password of the compose file."""
    given = {key: filled(value) for key, value in COMPOSE["services"]["database"]["environment"].items()}
    user, password = given["POSTGRES_USER"], given["POSTGRES_PASSWORD"]
    setup = (
        f"echo {password} > /tmp/password && B=$(ls -d /usr/lib/postgresql/*/bin) && "
        f"$B/initdb -D /tmp/db -U {user} --encoding=UTF8 --auth=scram-sha-256 --pwfile=/tmp/password && "
        f"(echo CREATE DATABASE {given['POSTGRES_DB']} | $B/postgres --single -D /tmp/db postgres) && "
        "exec $B/postgres -D /tmp/db -c listen_addresses=127.0.0.1 -c unix_socket_directories=/tmp"
    )
    container = services.container("localhost/database")
    words = services.buildah.words(container, ["sh", "-c", setup], {}, "--user=postgres", "--cap-drop=all")
    with process(words, services.buildah.folder / "database.log") as running:
        test = [part.replace("$$", "$") for part in COMPOSE["services"]["database"]["healthcheck"]["test"][1:]]
        tested = services.container("localhost/database")
        services.wait("database", services.buildah.words(tested, test, {}, "--user=postgres"), running)
        print("database: healthy", flush=True)
        yield


def check(buildah: Buildah) -> None:
    """Start the services in their order, and let the worker finish a run."""
    photos = buildah.folder / "photos"
    if not photos.exists():
        make_photos(photos / "train", 3)
        make_photos(photos / "test", 1)
    services = Services(buildah, photos)
    for port in PORTS:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                raise SystemExit(f"port {port} of 127.0.0.1 is in use")
    overrides = json.dumps({"images": "/photos/train", "test": "/photos/test", "run": "toy", "overrides": list(TINY)})
    run = ["prefect", "deployment", "run", "distill/distill", "--params", overrides, "--watch"]
    with ExitStack() as stack:
        stack.enter_context(database(services))
        stack.enter_context(services.started("server", "ddsr:cpu"))
        services.once("deploy", "ddsr:cpu")
        stack.enter_context(services.started("worker-cpu", "ddsr:cpu"))
        services.once("worker-cpu", "ddsr:cpu", run)
        services.once("worker-cpu", "ddsr:cpu", ["ddsr", "show", "toy"])
        stack.enter_context(services.started("worker-cuda", "ddsr:cuda"))
    services.once("worker-cuda", "ddsr:cuda", ["sh", "-c", "gcc --version && ddsr doctor || true"])
    report = services.home / "runs/toy/report.html"
    assert report.is_file(), report
    assert report.stat().st_uid == USER
    print(f"The run has finished: {report}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp/ddsr-containers"), help="for images, logs and the run")
    parser.add_argument("--driver", choices=["vfs", "overlay"], default="vfs", help="of the storage; overlay is faster")
    parser.add_argument("--only", choices=["build", "run"], help="build the images, or run what was built")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    buildah = Buildah(options.folder, options.driver)
    if options.only != "run":
        base = build_base(buildah)
        build_images(buildah)
        build_database(buildah, base)
    if options.only != "build":
        check(buildah)


if __name__ == "__main__":
    main()
