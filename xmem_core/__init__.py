"""XMem and Cutie: long-term video object segmentation with sensory, working and long-term memory.

Re-implementations of Cheng & Schwing, "XMem: Long-Term Video Object Segmentation with an Atkinson-Shiffrin
Memory Model" (ECCV 2022), and of its successor, Cheng et al., "Putting the Object Back into Video Object
Segmentation" (CVPR 2024), compatible with the published weights.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from xmem_core.onednn import keep_few_primitives
from xmem_core.openmp import wait_passively

# Torch loads its OpenMP runtime when it is imported: all modules that import torch are imported after this.
wait_passively()
keep_few_primitives()

if TYPE_CHECKING:
    from xmem_core.config import CutieConfig, MemoryConfig, ModelConfig
    from xmem_core.cutie import Cutie
    from xmem_core.network import XMem
    from xmem_core.segmenter import EncodedFrame, Prompt, StepResult, VideoSegmenter
    from xmem_core.state import PoisonedStateError, TrackerState
    from xmem_core.weight_files import WeightsError
    from xmem_core.weights import load_model

__all__ = [
    "Cutie",
    "CutieConfig",
    "EncodedFrame",
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


if not TYPE_CHECKING:
    _MODULES = {
        "Cutie": "cutie",
        "CutieConfig": "config",
        "EncodedFrame": "segmenter",
        "MemoryConfig": "config",
        "ModelConfig": "config",
        "PoisonedStateError": "state",
        "Prompt": "segmenter",
        "StepResult": "segmenter",
        "TrackerState": "state",
        "VideoSegmenter": "segmenter",
        "WeightsError": "weight_files",
        "XMem": "network",
        "load_model": "weights",
    }

    def __getattr__(name: str) -> object:
        """Import public names on first access, so that the configuration classes load without torch."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"xmem_core.{_MODULES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
