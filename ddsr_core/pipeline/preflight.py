"""What is looked at before the first stage: mistakes that would otherwise be found after the expensive part.

`check_request` takes no longer for many photos than for few. `notices_of` needs the digests of the photos, as every run.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ddsr_core.config import resolve_device
from ddsr_core.errors import InputError, StorageError
from ddsr_core.imaging.hold_out import PhotoDigests, left_out_text, without_tests
from ddsr_core.imaging.photos import UNREADABLE, iter_photos, photo_digests
from ddsr_core.pipeline.config import PipelineConfig
from ddsr_core.pipeline.request import Execution, RunRequest
from ddsr_core.pipeline.run_folder import check_run_name
from ddsr_core.sr.architectures import ARCHITECTURES, find_architecture
from ddsr_core.sr.networks import build_network
from ddsr_core.storage.store import Store

#: With less, not even the smallest run ends.
LEAST_FREE_BYTES = 500_000_000


@dataclass(frozen=True)
class Preflight:
    """What was found before a run.

    Attributes:
        lines: what will be used: photos, tests, device, free disk space.
        notices: what a user should know before the results are believed.
    """

    lines: tuple[str, ...]
    notices: tuple[str, ...]


def check_request(request: RunRequest, store: Store) -> PipelineConfig:
    """Find what is wrong with a request, without reading all photos.

    Returns:
        The configuration of the run.

    Raises:
        ConfigError: a wrong configuration, name, network or device.
        InputError: there are no photos or test photos.
        StorageError: the home cannot be written, or has no space.
    """
    config = request.resolved_config()
    check_run_name(request.run_name)
    require_photos(request.images, "photos", "--images")
    if request.test is not None:
        require_photos(request.test, "test photos", "--test")
    check_device(request)
    check_networks(request, config)
    store.check()
    check_space(store.home)
    return config


def check_networks(execution: Execution, config: PipelineConfig) -> None:
    """Make sure that networks of the user's own (``module:Class``) can be built, if this machine trains them.

    Raises:
        ConfigError: there is no such module or class, or it does not take the arguments.
    """
    if execution.gpu != "local":
        return
    recipes = [config.sr.recipe(arch, config.sr.seeds[0]) for arch in config.sr.archs]
    recipes += [config.teacher] if config.sample.needs_teacher else []
    recipes += [config.gsdd_generator] if "gsdd" in config.sr.training_sets else []
    for recipe in recipes:
        if recipe.arch not in ARCHITECTURES:
            build_network(recipe.arch, find_architecture(recipe.arch).arguments(recipe.scale, recipe.arch_kwargs))


def require_photos(source: Path, what: str, option: str) -> None:
    """Make sure that a photo source has at least one image.

    Raises:
        InputError: it has none, or is not there; the message names the option.
    """
    fix = f"name a folder of images, a Parquet file or a glob pattern with {option}"
    try:
        first = next(iter(iter_photos(source)), None)
    except InputError as error:
        raise InputError(f"{what}: {error.what}", where=source, fix=fix) from error
    if first is None:
        raise InputError(f"no {what} found", where=source, fix=fix)


def check_device(execution: Execution) -> None:
    """Make sure that the device is one of this machine, if this machine computes.

    Raises:
        ConfigError: it is not.
    """
    if execution.gpu == "local":
        resolve_device(execution.device)


def check_space(home: Path) -> None:
    """Make sure that the disk of a home is not full.

    Raises:
        StorageError: it is almost.
    """
    free = shutil.disk_usage(home).free
    if free < LEAST_FREE_BYTES:
        fix = "free some space (`ddsr gc` lists what no run needs) or choose another folder with --home"
        raise StorageError(f"only {free / 1e6:.0f} MB are free", where=home, fix=fix)


def preflight(request: RunRequest, store: Store) -> Preflight:
    """Everything that `ddsr distill --dry-run` looks at.

    Raises:
        As `check_request`; also ConfigError: all training photos are test photos.
    """
    config = check_request(request, store)
    photos = photo_digests(request.images)
    tests = photo_digests(request.test) if request.test is not None else []
    device = f"the GPU pool ({request.device})" if request.gpu == "pool" else resolve_device(request.device)
    held_out = "one photo in ten held out" if config.sr.archs else "none; no SR network is trained"
    lines = (
        f"photos: {counted(photos)} in {request.images}",
        f"tests: {counted(tests)} in {request.test}" if tests else f"tests: {held_out}",
        f"device: {device}; runner: {request.runner}",
        f"home: {store.url}, {shutil.disk_usage(store.home).free / 1e9:.0f} GB free",
    )
    remaining, common = without_tests(photos, [digest for _, digest in tests], request.images)
    return Preflight(lines, notices_of(config, remaining, tests, [name for name, _ in common]))


def counted(photos: PhotoDigests) -> str:
    """How many photos there are, and how many of them cannot be read."""
    unreadable = sum(digest.startswith(UNREADABLE) for _, digest in photos)
    return f"{len(photos)}" + (f" ({unreadable} cannot be read)" if unreadable else "")


def left_out_notices(left_out: Sequence[str]) -> tuple[str, ...]:
    """The notice about training photos with these names, which are also test photos; none without names."""
    if not left_out:
        return ()
    return (f"{left_out_text(len(left_out))}: {', '.join(left_out[:3])}{', …' if len(left_out) > 3 else ''}",)


def notices_of(
    config: PipelineConfig, photos: PhotoDigests, tests: PhotoDigests, left_out: Sequence[str] = ()
) -> tuple[str, ...]:
    """What is not wrong, but makes results say less than they seem to.

    Args:
        photos: training photos.
        left_out: names of photos that are not among them because they are test photos.
    """
    known = {digest for _, digest in photos}
    notices = [*left_out_notices(left_out)]
    if len(known) < config.clusters.k:
        notices.append(f"{len(known)} different photos for {config.clusters.k} clusters: clusters may be single photos")
    if tests and len(tests) < 5:
        notices.append(f"{len(tests)} test photos: differences between networks are within the noise")
    return tuple(notices)
