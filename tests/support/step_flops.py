"""Operations of a step, counted on PyTorch's meta device."""

from __future__ import annotations

import torch
from reference.plain_network import PlainXMem
from torch.utils.flop_counter import FlopCounterMode

from xmem_core import MemoryConfig, XMem
from xmem_core.weights import build_network

EVERY = 5
"""Frames from one memory frame to the next, as published."""


def gflop(model: XMem, plain: bool, objects: int, height: int, width: int, elements: int) -> float:
    """Operations of a step on a whole frame, in 10^9, a fifth of a memory frame's included.

    Args:
        plain: of the reference path, which convolves what objects share once for each.
        height, width: of the network's input, padded.
        elements: of memory.
    """
    config = model.config
    with torch.device("meta"):
        network = build_network(config)
        assert isinstance(network, XMem)
        network.__class__ = PlainXMem if plain else XMem
        image, h, w = torch.empty(1, 3, height, width), height // 16, width // 16
        read = torch.empty(1, objects, config.value_dim, h, w)
        hidden = torch.empty(1, objects, config.hidden_dim, h, w) if config.hidden_dim else None
        masks = torch.empty(1, objects, height, width)
    with torch.no_grad(), FlopCounterMode(display=False) as every:
        keys = network.encode_key(image)
        network.decode(keys.scales, read, hidden)
    with torch.no_grad(), FlopCounterMode(display=False) as some:
        network.encode_value(image, keys.f16, hidden, masks)
    chosen = elements if plain else MemoryConfig().top_k
    reading = 4 * config.key_dim * elements + 2 * objects * config.value_dim * chosen
    network_flops: float = every.get_total_flops() + some.get_total_flops() / EVERY
    return (network_flops + reading * h * w) / 1e9
