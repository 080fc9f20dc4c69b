"""Diffusion Transformer with adaLN-Zero (Peebles & Xie, "Scalable Diffusion Models with Transformers", ICCV 2023).

Parameter names are those of the original DiT release, so its state dicts load unchanged. DiffFit's scales
(Xie et al., ICCV 2023) are added by `DiT.enable_gammas`.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class DiTConfig(BaseModel):
    """Shape of a DiT. `DIT_XL_2_512` is the paper's."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    latent_px: int = Field(ge=2, description="Height and width of the latent.")
    patch: int = Field(2, ge=1, description="Height and width of a token, in latent pixels.")
    in_channels: int = Field(4, ge=1, description="Latent channels.")
    hidden: int = Field(ge=4, description="Token width.")
    depth: int = Field(ge=1, description="Transformer blocks.")
    heads: int = Field(ge=1, description="Attention heads.")
    mlp_ratio: float = Field(4.0, gt=0, description="MLP width over token width.")
    classes: int = Field(1000, ge=1, description="Rows of the class table, not counting the null row.")
    learn_sigma: bool = Field(True, description="Predict the variance as well, with twice the output channels.")

    @property
    def null_row(self) -> int:
        """Row of the class table for "no label"."""
        return self.classes


DIT_XL_2_512 = DiTConfig(latent_px=64, hidden=1152, depth=28, heads=16)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift ``x (B, N, D)`` by one ``(B, D)`` vector each per sample."""
    return x * (1 + scale[:, None]) + shift[:, None]


def timestep_frequencies(t: Tensor, dim: int = 256, max_period: float = 10_000) -> Tensor:
    """Sinusoidal embedding ``(B, dim)``, cosines first, frequencies ``max_period ** (-i / (dim/2))``."""
    half = dim // 2
    rates = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_table(hidden: int, grid: int) -> Tensor:
    """Fixed 2-D sine-cosine table ``(1, grid*grid, hidden)``: first half of a row encodes x, second half y."""
    quarter = hidden // 4
    rates = 1 / 10_000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * rates
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, hidden / 2)
    x = axis[None, :, :].expand(grid, grid, -1)
    y = axis[:, None, :].expand(grid, grid, -1)
    return torch.cat([x, y], dim=-1).reshape(1, grid * grid, hidden).float()


class PatchEmbed(nn.Module):
    """``(B, C, h, w)`` to tokens ``(B, N, D)``."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.hidden, config.patch, config.patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_frequencies(t))


class LabelEmbedder(nn.Module):
    """Class table with the null row last. Labels are dropped by the training step, not here."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.classes + 1, config.hidden)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.proj = nn.Linear(hidden, hidden)
        self.gamma_qkv: nn.Parameter | None = None
        self.gamma_proj: nn.Parameter | None = None

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, hidden = x.shape
        qkv = self.qkv(x)
        if self.gamma_qkv is not None:
            qkv = qkv * self.gamma_qkv
        q, k, v = qkv.reshape(batch, tokens, 3, self.heads, hidden // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, D / heads)
        x = self.proj(x.transpose(1, 2).reshape(batch, tokens, hidden))
        return x if self.gamma_proj is None else x * self.gamma_proj


class Mlp(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, inner)
        self.fc2 = nn.Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class DiTBlock(nn.Module):
    """Attention and MLP, each modulated and gated by the conditioning (adaLN-Zero)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(config.hidden, config.heads)
        self.norm2 = nn.LayerNorm(config.hidden, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(config.hidden, int(config.hidden * config.mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden, 6 * config.hidden))
        self.gamma_attn: nn.Parameter | None = None
        self.gamma_mlp: nn.Parameter | None = None

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        branch = gate_a[:, None] * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        x = x + (branch if self.gamma_attn is None else self.gamma_attn * branch)
        branch = gate_m[:, None] * self.mlp(modulate(self.norm2(x), shift_m, scale_m))
        return x + (branch if self.gamma_mlp is None else self.gamma_mlp * branch)

    def enable_gammas(self) -> None:
        """Add DiffFit's four scale vectors, as ones, unless the block has them already."""
        if self.attn.gamma_qkv is not None:
            return
        weight = self.attn.qkv.weight
        hidden = weight.shape[1]

        def ones(size: int) -> nn.Parameter:
            return nn.Parameter(torch.ones(size, device=weight.device, dtype=weight.dtype))

        self.attn.gamma_qkv, self.attn.gamma_proj = ones(3 * hidden), ones(hidden)
        self.gamma_attn, self.gamma_mlp = ones(hidden), ones(hidden)


class FinalLayer(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        outputs = config.in_channels * (2 if config.learn_sigma else 1)
        self.norm_final = nn.LayerNorm(config.hidden, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(config.hidden, config.patch**2 * outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden, 2 * config.hidden))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """Noise (and variance) predictor for latents.

    Attributes:
        config: its shape.
        checkpoint_blocks: recompute each block in the backward pass instead of storing its activations.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_blocks = False
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbedder(config.hidden)
        self.y_embedder = LabelEmbedder(config)
        grid = config.latent_px // config.patch
        self.pos_embed = nn.Parameter(position_table(config.hidden, grid), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict from noisy latents.

        Args:
            x: ``(B, in_channels, latent_px, latent_px)``.
            t: ``(B,)``, 0 to 999.
            y: ``(B,)`` int64 rows of the class table; ``config.null_row`` for no label.

        Returns:
            ``(B, 2 * in_channels, latent_px, latent_px)``: eps, then the variance interpolation in [-1, 1]
            (without ``learn_sigma`` eps alone).
        """
        tokens = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)  # (B, D)
        for block in self.blocks:
            if self.checkpoint_blocks and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, c, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = block(tokens, c)
        return self.unpatchify(self.final_layer(tokens, c))

    @property
    def layers(self) -> list[DiTBlock]:
        """The blocks, typed."""
        return cast("list[DiTBlock]", list(self.blocks))

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """``(B, N, patch * patch * C)`` to ``(B, C, h, w)``."""
        patch = self.config.patch
        grid = self.config.latent_px // patch
        x = tokens.reshape(tokens.shape[0], grid, grid, patch, patch, -1)
        return torch.einsum("nhwpqc->nchpwq", x).flatten(4, 5).flatten(2, 3)

    def enable_gammas(self, blocks: int) -> None:
        """Add DiffFit's scales to the first ``blocks`` blocks (all if there are fewer)."""
        for block in self.layers[:blocks]:
            block.enable_gammas()

    def initialize(self, generator: torch.Generator) -> None:
        """The paper's initialization: Xavier linears, N(0, 0.02) embeddings, zero modulations and output."""
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            if name.endswith("bias") or "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(parameter)
            elif name.startswith(("t_embedder", "y_embedder")):
                nn.init.normal_(parameter, std=0.02, generator=generator)
            else:
                nn.init.xavier_uniform_(parameter.flatten(1), generator=generator)
