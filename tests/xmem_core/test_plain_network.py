"""The step as it is computed gives the results of the plain reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from reference.plain_network import plain_segmenter
from support.small_net import SMALL_MEMORY, small_model

from xmem_core import Prompt, VideoSegmenter


def test_steps_agree_with_the_reference() -> None:
    """Two objects, one of them later, consolidation and eviction included."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (14, 50, 70, 3), dtype=np.uint8)
    masks = np.zeros((2, 50, 70), np.bool_)
    masks[0, 5:25, 5:30] = masks[1, 20:45, 35:65] = True
    settings = replace(SMALL_MEMORY, search_window=0)
    model = small_model()
    segmenters = VideoSegmenter(model, settings), plain_segmenter(model, settings)
    states = [segmenter.new_state() for segmenter in segmenters]
    for t, frame in enumerate(frames):
        prompt = {0: Prompt({1: masks[0]}), 3: Prompt({2: masks[1]})}.get(t)
        own, plain = (
            segmenter.step(state, frame, prompt) for segmenter, state in zip(segmenters, states, strict=True)
        )
        torch.testing.assert_close(own.probabilities, plain.probabilities, rtol=0, atol=2e-3)
        sizes = [state.memory.sizes for state in states if state.memory is not None]
        assert sizes[0] == sizes[1]
    assert sizes[0][1] > 0  # long-term memory
