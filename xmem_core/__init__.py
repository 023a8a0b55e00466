"""XMem: long-term video object segmentation with sensory, working and long-term memory.

A re-implementation of Cheng & Schwing, "XMem: Long-Term Video Object Segmentation with an Atkinson-Shiffrin
Memory Model" (ECCV 2022), compatible with the published weights.
"""

from typing import TYPE_CHECKING

from xmem_core.openmp import wait_passively

# Torch loads its OpenMP runtime when it is imported: all modules that import torch are imported after this.
wait_passively()

if TYPE_CHECKING:
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


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import the public names when one is first asked for: `import xmem_core` alone leaves torch out."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from xmem_core import config, network, segmenter, state, weights

        public = {}
        for module in (config, network, segmenter, state, weights):
            public.update({each: vars(module)[each] for each in __all__ if each in vars(module)})
        globals().update(public)
        return public[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
