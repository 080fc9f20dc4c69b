# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # First steps
#
# Distill a few photos, look at the result, and train an SR network on it. Open this file in Jupyter (with the jupytext
# extension) or run it with Python. With `SMALL = False` it takes about five minutes on two CPU cores.

# %%
import os
from pathlib import Path

from PIL import Image

import ddsr_core

#: A few steps of everything, to see that it runs. The results are then useless.
SMALL = os.environ.get("DDSR_SMALL") == "1"
FEW_STEPS = (
    "finetune.steps=2", "sample.count=7", "sample.oversample=1", "sample.steps=2", "teacher.iterations=2",
    "sr.train.iterations=2", "sr.archs=['edsr-small']",
)  # fmt: skip

# %% [markdown]
# ## Distill
#
# The demo photos come with scikit-image and scikit-learn. `distill` runs the paper's stages and compares SR networks trained
# on the distilled set, random crops, threshold crops and all photos. Run the cell again: every stage comes from the cache.

# %%
photos, tests = ddsr_core.demo_photos("photos")
run = ddsr_core.distill(photos, test=tests, preset="demo", overrides=FEW_STEPS if SMALL else ())
print(run.folder)

# %% [markdown]
# ## Look
#
# Each image belongs to a pseudo-label, a cluster of similar patches. `psnr_bic` is the PSNR that bicubic interpolation
# reaches on the image: lower means more fine texture.

# %%
images = ddsr_core.load_distilled(run.folder)
labels = sorted({image.label for image in images})
side = images[0].pixels.shape[0]
sheet = Image.new("RGB", (10 * side, len(labels) * side))
for row, label in enumerate(labels):
    for column, image in enumerate([image for image in images if image.label == label][:10]):
        sheet.paste(Image.fromarray(image.pixels), (column * side, row * side))
sheet.save("distilled.png")
print(len(images), "images;", "mean PSNR_bic", round(sum(image.row["psnr_bic"] for image in images) / len(images), 1), "dB")
sheet  # noqa: B018

# %% [markdown]
# ## Train
#
# Train an SR network on the distilled images, measure it and bicubic on the test photos, and enlarge a photo.

# %%
recipe = {"iterations": 2, "batch_size": 2} if SMALL else {"iterations": 2_000}
weights = ddsr_core.train(run.folder / "distilled", arch="edsr-small", lr_patch_px=16, **recipe)
for name, network in (("edsr-small", weights), ("bicubic", None)):
    print(name, ddsr_core.evaluate(network, tests))

# %%
photo = Image.open(next(Path(tests).iterdir()))
photo.resize((photo.width // 4, photo.height // 4), Image.Resampling.BICUBIC).save("small.png")
ddsr_core.upscale("small.png", "large.png", weights)
Image.open("large.png")
