"""Networks small enough for a hundred frames a second, and a clip of moving squares for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
from golden.cutie.weights import fill as fill_cutie
from golden.weights import fill
from numpy.typing import NDArray
from support.tiny import TINY

from xmem_core import Cutie, CutieConfig, MemoryConfig, ModelConfig, XMem

SMALL = replace(TINY, default_size=ModelConfig().default_size)
SMALL_CUTIE = CutieConfig(
    pixel_backbone="resnet18",
    mask_stem=8,
    mask_widths=(8, 8, 16),
    mask_blocks=(1, 1, 1),
    key_dim=16,
    dim=16,
    decoder_dims=(16, 8),
    queries=4,
    heads=2,
    ffn_dim=32,
    transformer_blocks=2,
)
SMALL_MEMORY = MemoryConfig(
    mem_every=2,
    top_k=8,
    min_mid_term_frames=2,
    max_mid_term_frames=4,
    num_prototypes=6,
    max_long_term_elements=20,
    max_permanent_frames=3,
)


def small_model(config: ModelConfig = SMALL) -> XMem:
    """Model with fixed weights that react to the input; torch's default ones give nearly constant outputs."""
    model = copy.deepcopy(_filled(config))
    model.config = config  # equal configurations may differ in defaults of memory and in presence
    return model


def small_cutie(config: CutieConfig = SMALL_CUTIE) -> Cutie:
    """The other network, with weights from the same kind of source."""
    model = copy.deepcopy(_filled_cutie(config))
    model.config = config
    return model


@cache
def _filled(config: ModelConfig) -> XMem:
    model = XMem(config)
    model.load_state_dict(fill(model.state_dict()))
    return model.eval()


@cache
def _filled_cutie(config: CutieConfig) -> Cutie:
    model = Cutie(config)
    model.load_state_dict(fill_cutie(model.state_dict()))
    return model.eval()


MODELS: dict[str, Callable[[], XMem | Cutie]] = {"xmem": small_model, "cutie": small_cutie}
"""Both kinds of network, for properties that hold for either."""


def square(height: int, width: int, top: int, left: int, side: int) -> NDArray[np.bool_]:
    mask = np.zeros((height, width), np.bool_)
    mask[top : top + side, left : left + side] = True
    return mask


def frame_at(index: int, height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    """Coloured noise, fixed per index, with two squares moving over it."""
    rng = np.random.default_rng(index % 97)
    image = rng.integers(60, 120, (height, width, 3), dtype=np.uint8)
    image[square(height, width, index % (height // 2), 4, 14)] = (220, 40, 40)
    image[square(height, width, 8, (3 * index) % (width // 2) + 12, 12)] = (40, 60, 230)
    return image
