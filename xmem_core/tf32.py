"""TensorFloat-32 on NVIDIA GPUs.

By default PyTorch computes float32 convolutions on a GPU in TF32, with 10 bits of mantissa instead of 23.
Results would then differ from a CPU's far more than by rounding of float32.
"""

from __future__ import annotations

import torch


def set_tf32(device: torch.device, allowed: bool) -> None:
    """Allow or forbid TF32 in this process's convolutions and matrix products, if the device is a GPU."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = allowed
        torch.backends.cudnn.allow_tf32 = allowed
