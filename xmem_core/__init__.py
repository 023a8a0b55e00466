"""XMem: long-term video object segmentation with sensory, working and long-term memory.

A re-implementation of Cheng & Schwing, "XMem: Long-Term Video Object Segmentation with an Atkinson-Shiffrin
Memory Model" (ECCV 2022), compatible with the published weights.
"""

from xmem_core.config import MemoryConfig, ModelConfig
from xmem_core.network import XMem
from xmem_core.segmenter import Prompt, StepResult, VideoSegmenter
from xmem_core.state import PoisonedStateError, TrackerState
from xmem_core.weights import WeightsError, load_model

__all__ = [
    "MemoryConfig",
    "ModelConfig",
    "PoisonedStateError",
    "Prompt",
    "StepResult",
    "TrackerState",
    "VideoSegmenter",
    "WeightsError",
    "XMem",
    "load_model",
]
