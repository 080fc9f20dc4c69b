"""Dataset distillation for super-resolution: the library (pure Python and PyTorch, no Prefect).

The stages, in the order of the paper: ``patches`` -> ``embeddings`` -> ``clusters`` -> ``diffusion.finetune`` ->
``sampling`` -> ``sr.train_sr`` -> ``evaluation`` -> ``report``.
"""

__version__ = "0.1.0"
