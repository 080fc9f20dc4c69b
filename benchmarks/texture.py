"""What the loss terms do to the texture of samples: mean PSNR_bic of images sampled after fine-tuning, by setting.

    python -m benchmarks.texture PHOTOS --home HOME [--set sample.count=70] [--only L_simple]

The protocol is `mini` of `ddsr reproduce` (ddsr-tiny), one seed, without selection and without detail restoration. A lower
PSNR_bic means more texture; the target is the value of the accepted patches. Stages are cached in HOME.
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

AS_SAMPLED = ("sample.oversample=1", "sample.max_cosine=1.0", "sample.detail_restoration=0")
NO_LSR = "finetune.lsr_mode=off"
ALL_T = "finetune.minimax_last_step=999"
SETTINGS: dict[str, tuple[str, ...]] = {
    "base, not fine-tuned": ("finetune.steps=0",),
    "L_simple": (NO_LSR, "finetune.lambda_r=0", "finetune.lambda_d=0"),
    "+ L_r and L_d at every t (released)": (NO_LSR, ALL_T),
    "+ L_d alone at every t": (NO_LSR, ALL_T, "finetune.lambda_r=0"),
    "+ L_r and L_d up to t = 258": (NO_LSR,),
    "and L_SR as in the paper": ("finetune.lsr_mode=pixels",),
    "and L_SR target, constant weight": ("finetune.lsr_adapt_every=null",),
    "and L_SR target, weight adapted to samples (best)": (),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="settings to measure")
    options = parser.parse_args(arguments)
    store, photos = Store(options.home), photo_source(options.photos)
    print("| fine-tuned with | PSNR_bic of samples, dB | of the patches, dB | max cosine to a patch |\n|---|---|---|---|")
    for name in options.only:
        config = load_config("demo", None, [*AS_SAMPLED, *SETTINGS[name], *options.set], protocol="mini")
        stages = Stages(config, plain_backend(Execution(device="cpu"), store, progress_for()))
        distilled = distill(stages, photos).images
        summary = json.loads((distilled.path / "summary.json").read_text())
        values = (summary["psnr_bic_mean"], summary["psnr_bic_real_mean"], summary["max_cosine_to_train"])
        print(f"| {name} | {values[0]:.2f} | {values[1]:.2f} | {values[2]:.3f} |", flush=True)


if __name__ == "__main__":
    main()
