"""What the license of a base model means for the images made with it."""

from __future__ import annotations

from typing import Any


def base_name(config: dict[str, Any]) -> str | None:
    """The base model that a run's config names as ``base``, at the top level or in a stage."""
    for value in (config.get("base"), *(v.get("base") for v in config.values() if isinstance(v, dict))):
        if isinstance(value, str):
            return value
    return None


def license_note(base: str | None) -> str:
    """What the license of the base model's weights means for images sampled from it."""
    if base is None:
        return "The run does not name its base model. Check the license of its weights before you share the images."
    if "dit-xl" in base.lower():
        return (
            f"The base model {base} is licensed under CC-BY-NC-4.0, for non-commercial use only. Whether images sampled "
            "from it inherit that limit is not settled; treat the distilled set as non-commercial."
        )
    if base.rstrip("/").endswith("ddsr-tiny"):
        return (
            "The base model ddsr-tiny was trained for this project on freely licensed photographs, which its model card "
            "names. The distilled set also derives from your photos, so their licenses apply to it."
        )
    return f"The base model is {base}. Check its license before you share its weights or images sampled from it."
