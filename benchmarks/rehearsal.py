"""The presets at full scale on a CPU, with random weights in the published formats: real shapes, real files, no pictures.

    python -m benchmarks.rehearsal WORK [--presets released paper best] [--toy]

Writes DiT-XL/2-512 (the original ``.pt`` and diffusers' folder), SD-VAE ft-mse, TAESD and open_clip ViT-B-32 into
WORK/models, and six photos. Each preset runs with 2 fine-tuning steps, 7 images, 2 sampling steps and 2 SR iterations per
network, to its report. The first one is killed in the middle and continued. ``DiTPipeline`` then samples from the export.
Tens of minutes, 20 GiB of memory and 15 GiB of disk; what is already in WORK is used again. ``--toy``: small models, to try
the script.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import open_clip
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiTPipeline, DiTTransformer2DModel
from PIL import Image

from ddsr_core.diffusion.dit import DIT_XL_2_512, DiT, DiTConfig
from ddsr_core.diffusion.layouts import to_diffusers
from ddsr_core.planning.bench import textured
from ddsr_core.planning.shapes import SD_VAE

GIB = 2**30
POLL_S = 0.5
#: Half a second of memory samples is too coarse for a stage that is shorter; those are left out of the table.
PRESETS = ("released", "paper", "best")
CLIP_NAME = "ViT-B-32"


@dataclass(frozen=True)
class Scale:
    """Sizes of the models and photos: the published ones, or small ones to try the script."""

    dit: DiTConfig
    vae_channels: tuple[int, ...]
    photo_px: int
    settings: tuple[str, ...]


SMALL_BUDGET = (
    "finetune.epochs=null", "finetune.steps=2", "finetune.batch_size=2", "sample.count=7", "sample.steps=2",
    "teacher.iterations=2", "sr.train.iterations=2", "sr.train.batch_size=2", "sample.max_cosine=1.0", "clusters.n_init=1",
)  # fmt: skip
FULL = Scale(DIT_XL_2_512, (128, 256, 512, 512), 1024, SMALL_BUDGET)
TOY_PATCHES = ("patches.patch_px=64", "patches.stride_px=64", "sample.oversample=1", "finetune.gamma_blocks=1",
               "finetune.lsr_crop_px=null", "finetune.class_row_init=null", "sr.archs=['edsr-small']",
               "sr.training_sets=['distilled']", "sr.train.lr_patch_px=16", "teacher.arch='edsr-small'",
               "teacher.lr_patch_px=16")  # fmt: skip
TOY = Scale(DiTConfig(latent_px=8, hidden=32, depth=2, heads=2), (8, 8, 8, 8), 256, (*SMALL_BUDGET, *TOY_PATCHES))


@dataclass
class StageUse:
    """What one stage took, as seen from outside: seconds from the run's own record, the peak sampled."""

    seconds: float = 0.0
    peak_gib: float = 0.0


@dataclass
class Use:
    """What a run took."""

    stages: dict[str, StageUse] = field(default_factory=dict)
    minutes: float = 0.0
    disk_gib: float = 0.0
    killed_in: str = ""


def randomize(module: torch.nn.Module) -> torch.nn.Module:
    """Small random weights: of a size that keeps activations finite."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.02, generator=generator)
    return module


def write_models(folder: Path, scale: Scale) -> None:
    """Each model once, in the layout that it is published in."""
    if (folder / "complete").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    vae = {name: value for name, value in SD_VAE.items() if not name.startswith("_")}
    groups = min(scale.vae_channels[0], 32)
    kl = randomize(AutoencoderKL(**{**vae, "block_out_channels": scale.vae_channels, "norm_num_groups": groups}))
    kl.save_pretrained(folder / "sd-vae-ft-mse")  # type: ignore[operator]
    randomize(AutoencoderTiny()).save_pretrained(folder / "taesd")  # type: ignore[operator]
    write_dit(folder, scale.dit)
    kl.save_pretrained(folder / "DiT-XL-2-512" / "vae")  # type: ignore[operator]
    clip = open_clip.create_model(CLIP_NAME)
    torch.save(clip.state_dict(), folder / f"{CLIP_NAME}.pt")
    (folder / "complete").touch()


def write_dit(folder: Path, shape: DiTConfig) -> None:
    """``DiT-XL-2-512x512.pt`` as released, and the folder ``DiT-XL-2-512`` as diffusers has it."""
    model = randomize(DiT(shape))
    file = folder / "DiT-XL-2-512x512.pt"
    torch.save(model.state_dict(), file)
    file.with_suffix(".json").write_text(json.dumps({"heads": shape.heads}))
    twin = DiTTransformer2DModel(
        num_attention_heads=shape.heads, attention_head_dim=shape.hidden // shape.heads, in_channels=shape.in_channels,
        num_layers=shape.depth, out_channels=2 * shape.in_channels, sample_size=shape.latent_px, patch_size=shape.patch,
        num_embeds_ada_norm=shape.classes,
    )  # fmt: skip
    twin.load_state_dict(to_diffusers(model.state_dict(), shape.depth), strict=False)
    twin.save_pretrained(folder / "DiT-XL-2-512" / "transformer")
    names = {str(row): f"class {row}" for row in range(shape.classes)}
    index = {"_class_name": "DiTPipeline", "id2label": names}
    (folder / "DiT-XL-2-512" / "model_index.json").write_text(json.dumps(index))


def write_photos(folder: Path, px: int) -> tuple[Path, Path]:
    """Six photos to train on and one to test on, all different."""
    train, test = folder / "train", folder / "test"
    picture = textured(px * 2, px * 2)
    for index in range(7):
        y, x = (index * 97) % px, (index * 193) % px
        target = (train if index < 6 else test) / f"{index}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        size = px if index < 6 else px // 4
        Image.fromarray(picture[y : y + size, x : x + size].copy()).save(target)
    return train, test


def settings_of(preset: str, models: Path, scale: Scale) -> list[str]:
    """What a preset is run with: the models on disk, and the small budget."""
    base = models / ("DiT-XL-2-512x512.pt" if preset == "released" else "DiT-XL-2-512")
    chosen = {
        "base": base, "vae": models / "sd-vae-ft-mse", "embeddings.weights": models / f"{CLIP_NAME}.pt",
        **({"lsr_decoder": models / "taesd"} if preset == "best" else {}),
    }  # fmt: skip
    accepted = ["patches.threshold_db=null", "patches.quantile=0.5"]  # random pictures know no 23 dB
    values = [f"{name}={value}" for name, value in chosen.items()]
    return [part for value in (*values, *accepted, *scale.settings) for part in ("--set", value)]


def resident_gib(process: int) -> float:
    """Resident memory of a process now."""
    try:
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return 0.0
    return int(found[1]) * 1024 / GIB if found else 0.0


def building(home: Path) -> str:
    """The stage that has an unfinished artifact."""
    partial = sorted(home.glob("artifacts/*/*.partial"), key=lambda path: path.stat().st_mtime)
    return partial[-1].parent.name if partial else "between stages"


def watch(command: list[str], home: Path, use: Use, kill_in: str | None = None) -> int:
    """Run a command and sample its memory by stage; with ``kill_in`` it is killed once that stage is under way."""
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))}
    process = subprocess.Popen(command, env=environment)
    seen_since = 0.0
    while process.poll() is None:
        stage = building(home)
        row = use.stages.setdefault(stage, StageUse())
        row.peak_gib = max(row.peak_gib, resident_gib(process.pid))
        if stage == kill_in:
            seen_since = seen_since or time.monotonic()
            if time.monotonic() - seen_since > 4 * POLL_S:
                process.send_signal(signal.SIGKILL)
                use.killed_in = stage
        time.sleep(POLL_S)
    return process.returncode


def rehearse(preset: str, work: Path, scale: Scale, kill_in: str | None) -> Use:
    """One preset to its report.

    Raises:
        SystemExit: the run failed.
    """
    home, models, use = work / "homes" / preset, work / "models", Use()
    train, test = write_photos(work / "photos", scale.photo_px)
    command = [
        sys.executable, "-m", "flows.cli.main", "distill", "--no-prefect", "--images", str(train), "--test", str(test),
        "--preset", preset, "--home", str(home), "--run", preset, *settings_of(preset, models, scale),
    ]  # fmt: skip
    begun = time.monotonic()
    if kill_in is not None:
        watch(command, home, use, kill_in)
    if watch(command, home, use) != 0:
        raise SystemExit(f"{preset} failed: {use}")
    use.minutes = (time.monotonic() - begun) / 60
    for stage in json.loads((home / "runs" / preset / "report.json").read_text())["stages"]:
        row = use.stages.setdefault(stage["name"], StageUse())
        row.seconds += stage["seconds"]
    use.disk_gib = sum(path.stat().st_size for path in home.rglob("*") if path.is_file() and not path.is_symlink()) / GIB
    return use


def sample_from_export(preset: str, work: Path) -> str:
    """Export the fine-tuned model for diffusers, and sample an image from it."""
    home, out = work / "homes" / preset, work / "exports" / preset
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "flows.cli.main", "export", preset, "--out", str(out), "--format", "diffusers"]
    subprocess.run([*command, "--home", str(home)], check=True)
    pipeline = DiTPipeline.from_pretrained(out)
    image = pipeline(class_labels=[0], num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    return f"DiTPipeline has sampled {image.width}x{image.height} px from the export of {preset}"


def table(uses: dict[str, Use]) -> str:
    """Markdown: one row per preset and stage."""
    lines = ["| preset | stage | seconds | peak, GiB |", "|---|---|---|---|"]
    for preset, use in uses.items():
        for stage, row in use.stages.items():
            peak = f"{row.peak_gib:.1f}" if row.peak_gib else "-"
            lines.append(f"| {preset} | {stage} | {row.seconds:.0f} | {peak} |")
        killed = f", killed in {use.killed_in} and continued" if use.killed_in else ""
        peak = max(row.peak_gib for row in use.stages.values())
        lines.append(f"| {preset} | **all**{killed} | {use.minutes * 60:.0f} | {peak:.1f} |")
        lines.append(f"| {preset} | disk of the home, GiB | {use.disk_gib:.2f} | |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for models, photos, homes and exports")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--kill-in", default="finetune", help="stage that the first preset is killed in")
    parser.add_argument("--toy", action="store_true", help="small models, to try the script")
    options = parser.parse_args(arguments)
    work, scale = options.work.absolute(), TOY if options.toy else FULL
    write_models(work / "models", scale)
    uses: dict[str, Use] = {}
    for index, preset in enumerate(options.presets):
        uses[preset] = rehearse(preset, work, scale, options.kill_in if index == 0 else None)
        print(table({preset: uses[preset]}), flush=True)
    said = sample_from_export(options.presets[-1], work)
    print(f"\n{os.cpu_count()} cores, torch {torch.__version__}\n\n{table(uses)}\n\n{said}.")


if __name__ == "__main__":
    main()
