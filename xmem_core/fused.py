"""Fused convolution and activation, for float32 and bfloat16 inference on CPUs.

On CPUs passes over memory cost more than the arithmetic. oneDNN, which PyTorch uses for the convolutions, can
apply activations and additions while it writes the output. PyTorch has undocumented operators for this, meant
for `torch.compile` (which would need a C++ compiler on every user's machine). They are tested before use;
without them, the plain modules are used.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmem_core.backbones import EfficientNetLite0Trunk, InvertedResidual
from xmem_core.network import XMem

logger = logging.getLogger(__name__)

# The operators' names and arguments of activations.
_ACTIVATIONS: dict[str | None, tuple[str, list[float]]] = {
    None: ("none", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
}
# Number of input sizes for which reordered weights are cached.
_MOST_SIZES = 8


class FusedConv2d(nn.Module):
    """Convolution fused with an activation or an addition.

    Args:
        conv: its weights are used as they are, not copied.
        activation: `relu6` or None.
        padding: vertical and horizontal padding, if not the convolution's own.
    """

    def __init__(
        self, conv: nn.Module, activation: str | None = None, padding: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        assert isinstance(conv, nn.Conv2d)
        self.weight, self.bias = conv.weight, conv.bias
        self._geometry = (
            conv.padding if padding is None else padding,
            conv.stride,
            conv.dilation,
            conv.groups,
        )
        self._name, self._arguments = _ACTIVATIONS[activation]
        # bfloat16 weights in oneDNN's layout, for the most recent input sizes.
        self._packed: dict[torch.Size, Tensor] = {}

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """x (N, C, h, w) -> (N, C', h', w'); `add`, of that shape, is added if there is no activation."""
        convolve = torch.ops.mkldnn._convolution_pointwise
        weight = self._packed_for(x)
        out: Tensor
        if add is None:
            out = convolve(x, weight, self.bias, *self._geometry, self._name, self._arguments, None)
        else:
            out = convolve.binary(x, add, weight, self.bias, *self._geometry, "add", 1.0, None, [], None)
        return out

    def _packed_for(self, x: Tensor) -> Tensor:
        if self.weight.dtype == torch.float32:
            # Reordered on each call, a copy for each input size is not kept: that takes as long.
            return self.weight
        packed = self._packed.get(x.shape)
        if packed is None:
            if len(self._packed) >= _MOST_SIZES:
                self._packed = {}  # a new dict: another thread may be reading the old one
            pack = torch.ops.mkldnn._reorder_convolution_weight
            packed = self._packed[x.shape] = pack(self.weight, *self._geometry, list(x.shape))
        return packed

    def __deepcopy__(self, memo: dict[int, object]) -> FusedConv2d:
        raise NotImplementedError("packed weights cannot be copied: fuse a copy of the network instead")


class _FusedInvertedResidual(nn.Module):
    def __init__(self, block: InvertedResidual) -> None:
        super().__init__()
        expand = block.expand_conv
        self.expand_conv = None if expand is None else FusedConv2d(expand, "relu6")
        self.depthwise_conv = FusedConv2d(block.depthwise_conv, "relu6")
        self.project_conv = FusedConv2d(block.project_conv)
        self.residual = block.residual

    def forward(self, x: Tensor) -> Tensor:
        out = x if self.expand_conv is None else self.expand_conv(x)
        out = self.depthwise_conv(out)
        projected: Tensor = self.project_conv(out, x if self.residual else None)
        return projected


class FusedTrunk(nn.Module):
    """Equivalent of an `EfficientNetLite0Trunk` in evaluation mode, with fewer rounding steps.

    Args:
        trunk: on a CPU, its norms folded and its convolutions in channels-last layout.
    """

    def __init__(self, trunk: EfficientNetLite0Trunk) -> None:
        super().__init__()
        self.channels, self._taps = trunk.channels, trunk.taps
        self._dtype = trunk.conv_stem.weight.dtype
        self.conv_stem = FusedConv2d(trunk.conv_stem, "relu6")
        blocks = [block for block in trunk.blocks if isinstance(block, InvertedResidual)]
        self.blocks = nn.ModuleList(_FusedInvertedResidual(block) for block in blocks)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, H, W) -> features at strides 16, 8 and 4."""
        x = self.conv_stem(image.to(self._dtype).contiguous(memory_format=torch.channels_last))
        found = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self._taps:
                found.append(x)
        f4, f8, f16 = found
        return f16, f8, f4


def fuse_trunk(network: XMem) -> None:
    """Replace the network's trunk by a `FusedTrunk` if it can be fused."""
    trunk = network.key_encoder
    if isinstance(trunk, EfficientNetLite0Trunk) and can_fuse(trunk.conv_stem.weight.dtype):
        network.key_encoder = FusedTrunk(trunk)  # type: ignore[assignment]


@cache
def can_fuse(dtype: torch.dtype) -> bool:
    """Whether this PyTorch has the fused operators and their results in this precision are correct."""
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(16, 16, 3, padding=1).requires_grad_(False)
    conv.weight.copy_(torch.randn(conv.weight.shape, generator=generator) / 3)
    x = torch.randn(1, 16, 8, 8, generator=generator)
    try:
        conv = conv.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        plain = F.conv2d(x, conv.weight, conv.bias, padding=1).float()
        pairs = [
            (FusedConv2d(conv, "relu6")(x).float(), plain.clamp(0, 6)),
            (FusedConv2d(conv)(x).float(), plain),
            (FusedConv2d(conv)(x, x).float(), plain + x.float()),
        ]
    except (AttributeError, RuntimeError, TypeError) as error:
        logger.info("this PyTorch cannot convolve and activate in one pass: %s", error)
        return False
    rtol, atol = (1e-4, 1e-4) if dtype == torch.float32 else (0.02, 0.05)
    return all(torch.allclose(own, wanted, rtol=rtol, atol=atol) for own, wanted in pairs)


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself; where it doesn't, that is slower than float32."""
    try:
        found: Mapping[str, object] = torch.cpu.get_capabilities()
    except (AttributeError, RuntimeError):  # an older torch, or a CPU it can't tell about
        return False
    return any(bool(found.get(name)) for name in ("avx512_bf16", "amx_bf16"))
