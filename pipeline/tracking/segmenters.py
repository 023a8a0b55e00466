"""Opens segmenters: model, device, precision, threads."""

from __future__ import annotations

import torch

from pipeline.base.errors import UsageError
from pipeline.tracking.model_files import weights_failure
from pipeline.tracking.settings import AUTO, ModelSettings
from xmem_core import MemoryConfig, VideoSegmenter, load_model
from xmem_core.fused import has_bfloat16
from xmem_core.weight_files import WeightsError


def open_segmenter(model: ModelSettings | None = None, memory: MemoryConfig | None = None) -> VideoSegmenter:
    """Open a segmenter from the same settings as `track`.

    For dtype "auto" see `auto_dtype`.

    Raises:
        UsageError: one of the arguments is wrong. XmemError: a published model cannot be fetched.
    """
    model = model or ModelSettings()
    check_device(model.device)
    if model.threads is not None:
        torch.set_num_threads(model.threads)
    try:
        network = load_model(model.name, model.device)
    except WeightsError as error:
        raise weights_failure(model.name, error) from error
    side = None if model.full_size else model.size or network.config.default_size
    dtype = model.dtype
    if dtype == AUTO:
        dtype = auto_dtype(torch.device(model.device), published=network.config.published)
    try:
        return VideoSegmenter(
            network,
            memory,
            size=side,
            dtype=getattr(torch, dtype),
            keep_model=False,
            compile=model.compile,
        )
    except ValueError as error:  # a memory setting that this model does not have, or that excludes another
        raise UsageError(f"{model.name}: {error}") from None


def auto_dtype(device: torch.device, *, published: bool) -> str:
    """The precision that dtype "auto" means on a device.

    float16 on a GPU: with `xmem-lite`, masks of real clips have a mean IoU of 0.998 with those in float32.
    bfloat16 on a CPU that is faster in it (with AMX), else float32; the trunk, whose keys are too coarse in
    bfloat16, stays in float32 then, and the mean IoU is 0.999.

    Args:
        published: whether it is a published model; these keep the precision they were published for.
    """
    if published:
        return "float32"
    if device.type == "cuda":
        return "float16"
    return "bfloat16" if device.type == "cpu" and has_bfloat16() else "float32"


def check_device(device: str) -> None:
    """Raises UsageError if torch cannot compute on a device; it would fail late, and in torch's words."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {device!r} cannot be used here: {reason}; cpu always can") from error
