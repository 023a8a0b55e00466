"""One network, prepared for inference once, under several memory settings."""

from __future__ import annotations

import copy

from xmem_core import MemoryConfig, VideoSegmenter


def with_memory(segmenter: VideoSegmenter, settings: MemoryConfig) -> VideoSegmenter:
    """The segmenter under other memory settings; both use the same network."""
    other = copy.copy(segmenter)
    other._steps = copy.copy(segmenter._steps)
    resolved = other._steps.resolve(settings, segmenter.config, segmenter.device)
    other.memory_config = other._steps.settings = resolved
    return other
