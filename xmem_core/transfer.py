"""Asynchronous copies between host memory and a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. To a GPU it is copied from page-locked memory, beside what the GPU computes.

    Torch keeps the page-locked copy until the upload is done, and uses its memory again.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def off_device(tensor: Tensor) -> Callable[[], Tensor]:
    """Start copying a tensor from its device to the host.

    From a GPU it is copied to page-locked memory on a stream of its own, beside what the GPU computes next.

    Returns:
        what waits for the copy and gives it, from any thread; for a tensor on the host, the tensor itself.
    """
    if tensor.device.type != "cuda":
        return lambda: tensor
    side = _side_stream(tensor.device)
    side.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(side):
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        done = torch.cuda.Event()
        done.record(side)
    tensor.record_stream(side)  # its memory is not given to others before

    def waited() -> Tensor:
        done.synchronize()
        return host

    return waited


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
