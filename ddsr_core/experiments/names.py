"""Names of the experiments and protocols of ``ddsr reproduce``: the only place that lists them. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

ExperimentName = Literal["table1", "table2", "table3", "ablation", "sources", "budget", "shares", "starts"]
#: What each experiment measures, in the order of help texts.
EXPERIMENTS: Mapping[ExperimentName, str] = {
    "table1": "Table I: GAN networks on distilled images and on GSDD",
    "table2": "Table II: networks trained on L1",
    "table3": "Table III: Real-ESRGAN on distilled images and on crops",
    "ablation": "what each part of the method contributes",
    "sources": "every kind of training set at one number of images",
    "budget": "the metrics against the number of iterations",
    "shares": "how much detail to restore",
    "starts": "samples that start at real patches",
}

#: ``mini``: small networks and few images. ``paper``: the paper's networks and numbers of images.
ProtocolName = Literal["mini", "paper"]
PROTOCOLS: Mapping[ProtocolName, str] = {
    "mini": "small networks, few images; hours on a CPU",
    "paper": "as in the paper; days on a GPU",
}
#: The preset that a protocol is laid over unless another one is named.
DEFAULT_PRESET: Mapping[ProtocolName, Literal["demo", "best"]] = {"mini": "demo", "paper": "best"}
