"""Prefect's task runners by the names that a request uses."""

from __future__ import annotations

import os
import socket
from contextlib import AbstractContextManager
from typing import Any
from urllib.parse import urlsplit

from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from ddsr_core.errors import ConfigError
from ddsr_core.parallel import begin_worker
from ddsr_core.pipeline.request import Runner

#: Timeout for the head node: a running one answers at once, a missing one should be reported within seconds.
RAY_ANSWERS_S = 10.0
#: Size of Ray's object store in bytes. Tasks exchange little data, as their results are in the home.
RAY_OBJECTS = 2**27


def task_runner(runner: Runner, workers: int) -> TaskRunner[Any]:
    """The task runner of that name. ``ray`` uses the cluster at $RAY_ADDRESS, or else starts one on this machine.

    Args:
        workers: number of parallel workers; a running Ray cluster takes as many as it has room for.

    Raises:
        ConfigError: prefect-ray is not installed, or nothing answers at $RAY_ADDRESS.
    """
    if runner == "threads":
        return ThreadPoolTaskRunner(max_workers=workers)
    if runner == "processes":
        return ProcessPoolTaskRunner(max_workers=workers, initializer=begin_worker, initargs=(workers, os.getpid()))
    try:
        from prefect_ray import RayTaskRunner
    except ImportError as error:
        raise ConfigError(
            "prefect-ray is not installed", where="runner", fix="install ddsr with the extra `ray`, here and on the cluster"
        ) from error
    address = os.environ.get("RAY_ADDRESS")
    if address:
        check_answers(address)
        return RayTaskRunner(address)
    return RayTaskRunner(init_kwargs={"num_cpus": workers, "include_dashboard": False, "object_store_memory": RAY_OBJECTS})


def check_answers(address: str) -> None:
    """Check that something listens at the address of a Ray cluster. Ray itself tries for minutes, then ends the process.

    Raises:
        ConfigError: nothing listens, or the address is invalid.
    """
    try:
        place = urlsplit(address if "://" in address else f"//{address}")
        host, port = place.hostname, place.port
    except ValueError:
        host, port = None, None
    fix = "start one (`ray start --head`) and name it as HOST:PORT, or unset RAY_ADDRESS to use this machine alone"
    if not host or not port:
        raise ConfigError("not the address of a Ray cluster", where=f"RAY_ADDRESS={address}", fix=fix)
    try:
        socket.create_connection((host, port), RAY_ANSWERS_S).close()
    except OSError as error:
        raise ConfigError(f"no Ray cluster answers: {error}", where=f"RAY_ADDRESS={address}", fix=fix) from error


def ray_resources(device: str) -> AbstractContextManager[None]:
    """While open, Ray reserves one core for each submitted task, and one GPU if the task uses one.

    Args:
        device: ``auto`` takes a GPU if the cluster has any.
    """
    import ray
    from prefect_ray.context import remote_options

    on_gpu = ray.cluster_resources().get("GPU", 0) > 0 if device == "auto" else device.startswith("cuda")
    return remote_options(num_cpus=1, num_gpus=1 if on_gpu else 0)
