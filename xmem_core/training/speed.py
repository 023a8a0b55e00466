"""Workarounds for convolutions whose bf16 backward pass is slow on CPUs.

oneDNN's bf16 backward in channels_last takes 3 to 9 times as long as in fp32 for depthwise convolutions,
strided ones and those with very few channels. On two cores these were 60 % of a step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from xmem_core.network import XMem


def tune_for_cpu(model: XMem) -> None:
    """Change precision and layout of single convolutions; results are equal up to rounding."""
    for module in model.key_encoder.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            full_precision(module)
    for module in model.value_encoder.modules():
        if (
            isinstance(module, nn.Conv2d)
            and module.stride == (2, 2)
            and module is not model.value_encoder.conv1
        ):
            full_precision(module)
    full_precision(model.decoder.pred)
    full_precision(model.key_proj.d_proj)
    # A tensor with two channels (the masks) is inefficient in channels_last.
    first = model.value_encoder.conv1
    first.weight.data = first.weight.data.contiguous(memory_format=torch.contiguous_format)


def full_precision(conv: nn.Conv2d) -> None:
    """Let a convolution compute in fp32 under autocast, in place."""
    plain = type(conv).forward

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return plain(conv, x.float()).to(x.dtype)

    # Patched on the instance: parameters, their names and the module tree are unchanged.
    patched: Any = conv
    patched.forward = forward
