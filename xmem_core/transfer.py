"""Uploads to a GPU that do not wait for it."""

from __future__ import annotations

import torch
from torch import Tensor


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. To a GPU it is copied from page-locked memory, beside what the GPU computes.

    Torch keeps the page-locked copy until the upload is done, and uses its memory again.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
