"""A tiny network with random weights: the whole algorithm, cheap enough for property tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from xmem_core import MemoryConfig, ModelConfig, XMem
from xmem_core.weights import save_weights

TINY = ModelConfig(
    key_backbone="efficientnet-lite0",
    value_stem=8,
    value_widths=(8, 8, 16),
    value_blocks=(1, 1, 1),
    key_dim=16,
    value_dim=16,
    hidden_dim=8,
    decoder_dims=(16, 16, 8),
    sensory_mid_dim=8,
    default_size=48,
)
SHORT_MEMORY = MemoryConfig(mem_every=2, min_mid_term_frames=2, max_mid_term_frames=4, num_prototypes=8)
"""Consolidates every few frames, so that a short clip uses all three memories."""
CAPPED_MEMORY = replace(SHORT_MEMORY, max_long_term_elements=40)
"""Also evicts elements before a short clip ends."""


def tiny_model(seed: int = 0) -> XMem:
    """The network, in eval mode. Its masks are meaningless, but depend on all previous input."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return XMem(TINY).eval()


def tiny_weights(folder: Path, seed: int = 0) -> str:
    """Path of the network's weights, as a file for `load_model`."""
    path = folder / f"tiny-{seed}.safetensors"
    save_weights(tiny_model(seed), path)
    return str(path)
