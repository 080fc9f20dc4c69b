"""What the loss terms do to the texture of samples: mean PSNR_bic of images drawn after fine-tuning, for several settings.

    python -m benchmarks.texture PHOTOS --home HOME [--set sample.count=70]

The small protocol of `ddsr reproduce` (ddsr-tiny), one seed, images as they are drawn. The lower, the more texture; the
row to meet is that of the accepted patches. Stages are cached in HOME.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ddsr_core.imaging.photos import photo_source
from ddsr_core.pipeline.config import load_config
from ddsr_core.pipeline.distill import distill
from ddsr_core.pipeline.plain import plain_backend
from ddsr_core.pipeline.request import Execution
from ddsr_core.pipeline.stages import Stages
from ddsr_core.storage.store import Store
from flows.cli.console import progress_for

AS_DRAWN = ("sample.oversample=1", "sample.max_cosine=1.0", "sample.detail_restoration=0")
NO_LSR = "finetune.lsr_mode=off"
ALL_T = "finetune.minimax_last_step=999"
SETTINGS: dict[str, tuple[str, ...]] = {
    "base, un-tuned": ("finetune.steps=0",),
    "L_simple": (NO_LSR, "finetune.lambda_r=0", "finetune.lambda_d=0"),
    "+ L_r and L_d at every t (released)": (NO_LSR, ALL_T),
    "+ L_d alone at every t": (NO_LSR, ALL_T, "finetune.lambda_r=0"),
    "+ L_r and L_d up to t = 258": (NO_LSR,),
    "and L_SR as the paper words it": ("finetune.lsr_mode=pixels",),
    "and L_SR target, constant weight": ("finetune.lsr_adapt_every=null",),
    "and L_SR target, led by samples (best)": (),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    arguments = parser.parse_args()
    store, photos = Store(arguments.home), photo_source(arguments.photos)
    print("| fine-tuned with | PSNR_bic of samples, dB | of the patches, dB | max cosine to a patch |\n|---|---|---|---|")
    for name, overrides in SETTINGS.items():
        config = load_config("demo", None, [*AS_DRAWN, *overrides, *arguments.set], scale="mini")
        stages = Stages(config, plain_backend(Execution(device="cpu"), store, progress_for()))
        sampled = distill(stages, photos).images
        facts = json.loads((sampled.path / "summary.json").read_text())
        values = (facts["psnr_bic_mean"], facts["psnr_bic_real_mean"], facts["max_cosine_to_train"])
        print(f"| {name} | {values[0]:.2f} | {values[1]:.2f} | {values[2]:.3f} |", flush=True)


if __name__ == "__main__":
    main()
