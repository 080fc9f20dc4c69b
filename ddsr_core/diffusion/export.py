"""Export of a fine-tuned model: one file in the original DiT layout, or a folder for diffusers' ``DiTPipeline``.

DiffFit's scales are folded into the weights, so the export is a plain DiT.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ddsr_core.diffusion.base import Base, tidy_vae_config
from ddsr_core.diffusion.codec import Codec
from ddsr_core.diffusion.dit import DiT
from ddsr_core.diffusion.layouts import to_diffusers
from ddsr_core.diffusion.published import import_diffusers
from ddsr_core.errors import InputError
from ddsr_core.storage.files import storage_errors, write_atomically, write_json

Format = Literal["original", "diffusers"]
#: ``DiTPipeline`` uses row 1000 for "no label" regardless of the size of the table.
PIPELINE_NULL_ROW = 1000
TABLE = "y_embedder.embedding_table.weight"
ORIGINAL = "dit.safetensors"
ORIGINAL_USE = """\
`dit.safetensors` has the names of the original DiT release: `load_state_dict` of its code takes it, and
so does ddsr (`base`, with a `vae`).
"""
PIPELINE_USE = """\
    from diffusers import DiTPipeline

    pipeline = DiTPipeline.from_pretrained(".")
    for block in pipeline.transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    images = pipeline([0, 1], num_inference_steps=25).images  # class ids: the rows named above

The loop sets the timestep frequencies of the original DiT, with which the weights were trained; diffusers' config cannot.
"""


def export(model: Base, label_map: dict[int, int], out: Path, kind: Format) -> Path:
    """Write ``model``, fine-tuned and folded, into the new folder ``out``, completely or not at all.

    Args:
        label_map: pseudo-label -> row of the class table.

    Returns:
        ``out``.

    Raises:
        InputError: ``out`` is not empty, a label has no row, or the format cannot represent the model.
        StorageError: ``out`` cannot be written.
    """
    require_new_folder(out)
    _check_labels(label_map, model.null_row)
    partial = out.with_name(f".{out.name}.ddsr-partial")
    write = {"original": write_original, "diffusers": write_pipeline}[kind]
    with storage_errors(out):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(write, model, label_map, partial)
        if out.exists():
            out.rmdir()
        os.rename(partial, out)
    return out


def require_new_folder(out: Path) -> None:
    """
    Raises:
        InputError: ``out`` is a file or a folder that is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError("the folder is not empty", where=out, fix="name a new folder with --out")


def _check_labels(label_map: dict[int, int], null_row: int) -> None:
    beyond = [label for label, row in sorted(label_map.items()) if not 0 <= row < null_row]
    if beyond:
        raise InputError(
            f"pseudo-label {beyond[0]} has row {label_map[beyond[0]]}, the class table has rows 0 to {null_row - 1}",
            fix="fine-tune again",
        )


def _write(
    write: Callable[[Base, dict[int, int], Path], None], model: Base, label_map: dict[int, int], folder: Path
) -> None:
    try:
        write(model, label_map, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def write_original(model: Base, label_map: dict[int, int], folder: Path) -> None:
    """``dit.safetensors`` with the names of the original release, and the number of heads in a JSON file beside it."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.dit.state_dict().items()}
    labels = json.dumps({str(label): row for label, row in sorted(label_map.items())})
    facts = {"label_map": labels, "base": model.info.name, "base_digest": model.digest}
    write_atomically(folder / ORIGINAL, save(state, metadata=facts))
    write_json((folder / ORIGINAL).with_suffix(".json"), {"heads": model.dit.config.heads})
    _write_readme(model, label_map, folder, ORIGINAL_USE)


def write_pipeline(model: Base, label_map: dict[int, int], folder: Path) -> None:
    """What ``DiTPipeline.from_pretrained`` loads: transformer, VAE, scheduler, and names of the pseudo-labels."""
    diffusers = import_diffusers()
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False,
        prediction_type="epsilon",
    )  # fmt: skip
    pipeline = diffusers.DiTPipeline(pipeline_transformer(model.dit), pipeline_vae(model.codec), scheduler)
    pipeline.save_pretrained(folder)
    tidy_vae_config(folder / "vae")
    index = json.loads((folder / "model_index.json").read_text())
    names = {str(row): f"pseudo-label {label}" for label, row in label_map.items()}
    write_json(folder / "model_index.json", {**index, "id2label": names})
    _write_readme(model, label_map, folder, PIPELINE_USE)


def pipeline_transformer(dit: DiT) -> Any:
    """diffusers' ``DiTTransformer2DModel`` with the weights of ``dit`` and a class table padded to 1001 rows.

    Its layer norms get the original's epsilon. Its timestep frequencies cannot be set through its config: they remain those
    of diffusers' port, which divides by 127 where the original divides by 128.

    Raises:
        InputError: the class table is too large for the pipeline's null row.
    """
    diffusers = import_diffusers()
    c = dit.config
    state = {name: value.detach().cpu() for name, value in dit.state_dict().items()}
    if any("gamma" in name for name in state):
        raise InputError("the model still has DiffFit scales", fix="fold them first")
    if int(c.hidden * c.mlp_ratio) != 4 * c.hidden:
        raise InputError("diffusers' DiT has MLPs of four times its width", fix="export with --format original")
    state[TABLE] = _fill_table(state[TABLE])
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=c.heads, attention_head_dim=c.hidden // c.heads, in_channels=c.in_channels,
        out_channels=c.in_channels * (2 if c.learn_sigma else 1), num_layers=c.depth, sample_size=c.latent_px,
        patch_size=c.patch, num_embeds_ada_norm=PIPELINE_NULL_ROW, norm_eps=1e-6,
    )  # fmt: skip
    missing, unexpected = transformer.load_state_dict(to_diffusers(state, c.depth), strict=False)
    if unexpected or any(name != "pos_embed.pos_embed" for name in missing):
        raise InputError(f"diffusers' DiT cannot represent this shape: {[*missing, *unexpected][:3]}")
    return transformer.eval()


def _fill_table(table: Tensor) -> Tensor:
    classes = len(table) - 1
    if classes > PIPELINE_NULL_ROW:
        raise InputError(
            f"a class table of {classes} rows does not fit DiTPipeline, whose null row is {PIPELINE_NULL_ROW}",
            fix="export with --format original",
        )
    filler = table.new_zeros(PIPELINE_NULL_ROW - classes, table.shape[1])
    return torch.cat([table[:classes], filler, table[classes:]])


def pipeline_vae(codec: Codec) -> Any:
    """The VAE such that ``decode(latents / scaling_factor)`` and ``encode(…) * scaling_factor`` equal the codec's.

    A single scale becomes ``scaling_factor``. Shifts and scales per channel, as in ddsr-tiny, are folded into the last
    convolution of the encoder, which is exact, and the first of the decoder, which is exact to first order because its
    soft clamp comes before.
    """
    vae = copy.deepcopy(codec.vae).cpu()
    if not any(codec.shift) and len(set(codec.scale)) == 1:
        vae.register_to_config(scaling_factor=codec.scale[0])
        return vae
    if not codec.is_tiny:
        raise InputError(
            "DiTPipeline cannot scale the latents of this VAE channel by channel", fix="export with --format original"
        )
    shift, scale = torch.tensor(codec.shift), torch.tensor(codec.scale)
    last, first = vae.encoder.layers[-1], vae.decoder.layers[0]
    if not isinstance(last, nn.Conv2d) or not isinstance(first, nn.Conv2d) or last.bias is None or first.bias is None:
        raise InputError("the VAE does not begin and end as an AutoencoderTiny does", fix="export with --format original")
    with torch.no_grad():
        last.bias.sub_(shift).mul_(scale)
        last.weight.mul_(scale[:, None, None, None])
        first.bias.add_((first.weight * shift[None, :, None, None]).sum((1, 2, 3)))
        first.weight.div_(scale[None, :, None, None])
    vae.register_to_config(scaling_factor=1.0)
    return vae


def _write_readme(model: Base, label_map: dict[int, int], folder: Path, use: str) -> None:
    labels = ", ".join(f"{label} -> {row}" for label, row in sorted(label_map.items()))
    text = (
        f"# {model.info.name}, fine-tuned by ddsr\n\n"
        f"A diffusion transformer for images of {model.image_px} px. Pseudo-label -> row of the class table: {labels}.\n\n"
        f"{use}\n"
        f"License of the base: {model.info.license or 'not known'}\n"
    )
    write_atomically(folder / "README.md", text.encode())
