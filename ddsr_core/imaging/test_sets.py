"""Published layouts of test sets: which files are HR images, and which LR image belongs to each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ddsr_core.errors import ChangedInputError, InputError
from ddsr_core.imaging.decode import UnusableImage, image_size
from ddsr_core.imaging.photos import Photo, digested_photos, iter_photos, source_digest

#: Folders of HR images, and of LR images beside them ({scale} is filled in). Glob patterns; the first match counts.
HR_FOLDERS = ("HR", "GT", "GTmod*", "*_HR")
LR_FOLDERS = ("LRx{scale}", "LR_bicubic/X{scale}", "LRbicx{scale}", "*_LR_bicubic/X{scale}", "LR/X{scale}", "LR")

_SRF = re.compile(r"(?P<name>.*)_SRF_(?P<scale>\d+)_(?P<kind>HR|LR)")


#: What tells the photos of a source apart: the file, or the name in Parquet and how often that name occurred before.
_Place = tuple[Path | str, int]


@dataclass(frozen=True)
class HrImage:
    """An HR image, with its LR image if the test set contains pairs."""

    hr: Photo
    lr: Photo | None = None


def find_pairs(test: Path | str, scale: int = 4, mod_crop: int = 0) -> list[HrImage]:
    """The images of a test set, ordered by name.

    ========================================================  =================================================
    layout                                                    what is taken
    ========================================================  =================================================
    ``HR/`` and ``LRx4/``, ``LR_bicubic/X4/`` or ``LR/``;     pairs; the LR name may end in ``x4``
    ``GTmod12/`` and ``LRbicx4/``; ``DIV2K_valid_HR/`` and
    ``DIV2K_valid_LR_bicubic/X4/``
    ``image_SRF_4/``, or files ``*_SRF_4_HR`` in the folder   pairs ``*_SRF_4_HR`` and ``*_SRF_4_LR``, no others
    ``HR/`` (or ``GT``, …) without LR images of this scale    HR images; LR images are made from them
    anything that `iter_photos` reads; OST300: all but its    HR images; LR images are made from them
    segmentations, in folders ``*_anno``
    ========================================================  =================================================

    Args:
        test: a folder, or any other photo source.
        scale: upsampling factor of the pairs.
        mod_crop: HR images may exceed ``scale`` times their LR image by less than this, or than ``scale``.

    Raises:
        InputError: no images, an image of a pair without its partner, or a partner that is not ``1 / scale`` as large.
    """
    folder = Path(test).expanduser()
    if folder.is_dir():
        pairs = _srf_pairs(folder, scale) or _folder_pairs(folder, scale) or _without_segmentations(iter_photos(test))
    else:
        pairs = [HrImage(photo) for photo in iter_photos(test)]
    if not pairs:
        raise InputError("the test set has no images", where=test, fix="name a folder of HR images")
    for pair in pairs:
        _check_sizes(pair, scale, mod_crop)
    return pairs


@dataclass(frozen=True)
class PinnedPairs:
    """The images of a test set as they were when its digest was computed.

    Attributes:
        pairs: as of `find_pairs`; reading a photo that has changed since raises `ChangedInputError`.
        digest: of the whole source, as of `ddsr_core.imaging.photos.photo_source`.
    """

    pairs: list[HrImage]
    digest: str


def pinned_pairs(test: Path | str, scale: int = 4, mod_crop: int = 0) -> PinnedPairs:
    """`find_pairs`, and the digest of every photo of the test set, so that what is measured is what the digest says.

    Raises:
        ChangedInputError: a photo was added or changed in the meantime.
        InputError: as `find_pairs`.
    """
    entries = digested_photos(test)
    digests = dict(zip(_places(photo for photo, _ in entries), (digest for _, digest in entries), strict=True))
    found = find_pairs(test, scale, mod_crop)
    hr = _pinned([pair.hr for pair in found], digests)
    lr: Sequence[Photo | None] = _pinned([pair.lr for pair in found if pair.lr], digests) or [None] * len(hr)
    pairs = [HrImage(*pair) for pair in zip(hr, lr, strict=True)]
    return PinnedPairs(pairs, source_digest((photo.name, digest) for photo, digest in entries))


def _pinned(photos: list[Photo], digests: Mapping[_Place, str]) -> list[Photo]:
    places = list(_places(photos))
    unknown = [photo.name for photo, place in zip(photos, places, strict=True) if place not in digests]
    if unknown:
        raise ChangedInputError(
            f"{unknown[0]} is not among the photos of the test set",
            fix="run again if it was just added; a folder that is hidden or inside a home has to be named itself",
        )
    return [photo.pinned(digests[place]) for photo, place in zip(photos, places, strict=True)]


def _places(photos: Iterable[Photo]) -> Iterator[_Place]:
    rows: Counter[str] = Counter()
    for photo in photos:
        if photo.path is not None:
            yield photo.path.resolve(), 0
        else:
            yield photo.name, rows[photo.name]
            rows[photo.name] += 1


def spare_px(hr: tuple[int, int], lr: tuple[int, int], scale: int, mod_crop: int = 0) -> tuple[int, int]:
    """By how many pixels an HR image exceeds ``scale`` times its LR image. Both sizes are in the same order.

    Raises:
        InputError: the excess is negative, or not below ``scale`` and ``mod_crop``.
    """
    spare = hr[0] - lr[0] * scale, hr[1] - lr[1] * scale
    if min(spare) < 0 or max(spare) >= max(mod_crop, scale):
        raise InputError(
            f"LR {lr[0]}x{lr[1]} is not HR {hr[0]}x{hr[1]} divided by {scale}",
            fix=f"provide LR images of 1/{scale} the size",
        )
    return spare


def _srf_pairs(folder: Path, scale: int) -> list[HrImage]:
    """Pairs of files ``*_SRF_<scale>_HR`` and ``_LR``. Results of other methods in the same folder are ignored."""
    named = [(match, photo) for photo in iter_photos(folder) if (match := _SRF.fullmatch(_stem(photo)))]
    if not named:
        return []
    kinds: dict[str, dict[str, Photo]] = {"HR": {}, "LR": {}}
    for match, photo in named:
        if int(match["scale"]) == scale:
            kinds[match["kind"]][match["name"]] = photo
    if not kinds["HR"]:
        scales = ", ".join(sorted({f"x{match['scale']}" for match, _ in named}))
        raise InputError(f"the pairs are for {scales}, not x{scale}", where=folder, fix="name another folder or scale")
    return _matched(kinds["HR"], kinds["LR"], folder) if kinds["LR"] else [HrImage(hr) for hr in kinds["HR"].values()]


def _folder_pairs(folder: Path, scale: int) -> list[HrImage]:
    hr_folder = _first(folder, HR_FOLDERS)
    if hr_folder is None:
        return []
    hr = {_stem(photo): photo for photo in iter_photos(hr_folder)}
    lr_folder = _first(folder, [pattern.format(scale=scale) for pattern in LR_FOLDERS])
    if lr_folder is None:
        return [HrImage(photo) for photo in hr.values()]
    lr = {re.sub(rf"x{scale}$", "", _stem(photo)): photo for photo in iter_photos(lr_folder)}
    return _matched(hr, lr, folder)


def _first(folder: Path, patterns: Iterable[str]) -> Path | None:
    return next((path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_dir()), None)


def _matched(hr: dict[str, Photo], lr: dict[str, Photo], folder: Path) -> list[HrImage]:
    lonely = {"LR": sorted(hr.keys() - lr.keys()), "HR": sorted(lr.keys() - hr.keys())}
    if any(lonely.values()):
        said = [f"no {kind} partner for {_some(names)}" for kind, names in lonely.items() if names]
        raise InputError("; ".join(said), where=folder, fix="give both images of a pair the same name")
    return [HrImage(photo, lr[name]) for name, photo in hr.items()]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _without_segmentations(photos: Iterable[Photo]) -> list[HrImage]:
    return [HrImage(photo) for photo in photos if not any(part.endswith("_anno") for part in Path(_stem(photo)).parts)]


def _stem(photo: Photo) -> str:
    return Path(photo.name).with_suffix("").as_posix()


def _check_sizes(pair: HrImage, scale: int, mod_crop: int) -> None:
    sizes = [_size(photo) for photo in (pair.hr, pair.lr) if photo]
    if len(sizes) == 1 or None in sizes:  # an unreadable image is skipped with its reason when it is measured
        return
    hr, lr = (size for size in sizes if size)
    try:
        spare_px(hr, lr, scale, mod_crop)
    except InputError as error:
        raise InputError(error.what, where=pair.hr.name, fix=error.fix) from error


def _size(photo: Photo) -> tuple[int, int] | None:
    """Width and height as shown, from the file's header; None if it cannot be read."""
    try:
        return image_size(photo.content())
    except UnusableImage:
        return None
