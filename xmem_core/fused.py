"""Fused convolution and activation, for float32 and bfloat16 inference on CPUs.

On CPUs passes over memory cost more than the arithmetic. oneDNN, which PyTorch uses for the convolutions, can
apply activations and additions while it writes the output. PyTorch has undocumented operators for this, meant
for `torch.compile` (which would need a C++ compiler on every user's machine). They are tested before use;
without them, the plain modules are used.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmem_core.aside import divides, in_parts
from xmem_core.backbones import BasicBlock, Bottleneck, EfficientNetLite0Trunk, InvertedResidual
from xmem_core.blocks import ResidualBlock, SplitConv2d, as_channels_last, spread
from xmem_core.network import XMem
from xmem_core.winograd import WinogradConv2d

logger = logging.getLogger(__name__)

# The operators' names and arguments of activations.
_ACTIVATIONS: dict[str | None, tuple[str, list[float]]] = {
    None: ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
}
# Bytes of an expanded image that are computed at once.
_MOST_AT_ONCE = 24 << 20
# Number of input sizes for which bfloat16 weights in oneDNN's layout are cached.
_MOST_SIZES = 8
# Height and width of the input for which float32 weights are laid out. Not those of the first input: which
# frames a process has seen must not make a difference to last bits.
_LAID_OUT_FOR = (32, 32)
# Number of input sizes for which the layout that oneDNN prefers is cached, and of a weight's layouts: for all
# sizes together it prefers one or two.
_MOST_KNOWN_SIZES = 256
_MOST_LAYOUTS = 4


class FusedConv2d(nn.Module):
    """Convolution fused with an addition and an activation.

    Args:
        conv: its weights are copied into oneDNN's layout in float32, and used as they are in bfloat16.
        activation: `relu`, `relu6` or None.
        laid_out_for: height and width of the input for which float32 weights are laid out. Where oneDNN
            prefers another layout for inputs of another size, they are laid out in that too, once: on each
            call it could take 20 times as long as the convolution. The result is the same. A layout that no
            input has needed is not kept.
    """

    weight: Tensor

    def __init__(
        self,
        conv: nn.Module,
        activation: str | None = None,
        laid_out_for: tuple[int, int] = _LAID_OUT_FOR,
    ) -> None:
        super().__init__()
        assert isinstance(conv, nn.Conv2d)
        self.bias = conv.bias
        self.dtype, self.out_channels = conv.weight.dtype, conv.out_channels
        self._geometry = (
            conv.padding,
            conv.stride,
            conv.dilation,
            conv.groups,
        )
        self._name, self._arguments = _ACTIVATIONS[activation]
        weight: Tensor = conv.weight
        if self.dtype == torch.float32:
            # oneDNN would reorder them on each call, for a tenth of the time of an average convolution.
            weight = self._laid_out(weight, (1, conv.in_channels, *laid_out_for))
        self.register_buffer("weight", weight, persistent=False)
        # Weights in oneDNN's layout for the most recent input sizes; in float32 for these and numbers of
        # threads, but each layout, in `_layouts`, is there once.
        self._packed: dict[tuple[torch.Size, int], Tensor] = {}
        self._layouts: dict[bytes | None, Tensor] = {}

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """x (N, C, h, w) -> (N, C', h', w'); `add`, of that shape, is added before the activation."""
        convolve = torch.ops.mkldnn._convolution_pointwise
        weight = self._packed_for(x)
        out: Tensor
        if add is None:
            out = convolve(x, weight, self.bias, *self._geometry, self._name, self._arguments, None)
        else:
            name = None if self._name == "none" else self._name
            arguments = (*self._geometry, "add", 1.0, name, self._arguments, None)
            out = convolve.binary(x, add, weight, self.bias, *arguments)
        return out

    def _packed_for(self, x: Tensor) -> Tensor:
        float32 = self.dtype == torch.float32
        key = x.shape, torch.get_num_threads() if float32 else 0
        packed = self._packed.get(key)
        if packed is None:
            if len(self._packed) >= (_MOST_KNOWN_SIZES if float32 else _MOST_SIZES):
                self._packed = {}  # a new dict: another thread may be reading the old one
            packed = self._preferred(x.shape) if float32 else self._laid_out(self.weight, x.shape)
            self._packed[key] = packed
        return packed

    def _preferred(self, shape: torch.Size) -> Tensor:
        """The float32 weights in the layout that oneDNN prefers for inputs of this shape, kept once."""
        if self._geometry[-1] != 1:  # weights of few bytes
            return self.weight
        # Only the layout is wanted, so any values do: those of `weight` would first have to be put in order.
        values = torch.empty(
            self.weight.shape, dtype=self.dtype, device="cpu", memory_format=torch.channels_last
        )
        layout = _layout_of(self._laid_out(values, shape))
        del values
        known = self._layouts.get(layout)
        if known is not None or len(self._layouts) >= _MOST_LAYOUTS:
            return self.weight if known is None else known
        known = self.weight
        if _layout_of(known) != layout:
            known = self._laid_out(known.to_dense(), shape)
            if not self._layouts:  # nothing has been computed with the first one: memory for one is enough
                self.weight = known
        self._layouts[layout] = known
        return known

    def _laid_out(self, weight: Tensor, shape: Sequence[int]) -> Tensor:
        """The weights in the layout that oneDNN prefers for inputs of this shape.

        They serve inputs of any shape; where oneDNN prefers another layout, it reorders them each time.
        """
        laid_out: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, *self._geometry, list(shape))
        return laid_out

    def __deepcopy__(self, memo: dict[int, object]) -> FusedConv2d:
        raise NotImplementedError("packed weights cannot be copied: fuse a copy of the network instead")


def _layout_of(weight: Tensor) -> bytes | None:
    """What tells layouts of the same weights apart; None if this PyTorch does not say it.

    These are the strides and blocks in oneDNN's `dnnl_memory_desc`. The rest is the same in all layouts or
    undefined.
    """
    try:
        described = bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(weight).tolist())
    except (AttributeError, RuntimeError):
        return None
    return described[320:420] + described[424:616]


class _FusedInvertedResidual(nn.Module):
    """Equivalent of an `InvertedResidual` whose norms are folded.

    In float32 a single image is computed in strips if what it is expanded to would be large: glibc takes
    blocks of more than 32 MiB from the system each time, and fresh pages cost more than the arithmetic.
    """

    def __init__(self, block: InvertedResidual) -> None:
        super().__init__()
        expand = block.expand_conv
        self.expand_conv = None if expand is None else FusedConv2d(expand, "relu6")
        self.depthwise_conv = FusedConv2d(block.depthwise_conv, "relu6")
        self.project_conv = FusedConv2d(block.project_conv)
        self.residual = block.residual
        conv = block.depthwise_conv
        self.kernel, self.stride = conv.kernel_size[0], conv.stride[0]

    def forward(self, x: Tensor) -> Tensor:
        expand = self.expand_conv
        if expand is not None and len(x) == 1 and x.dtype == expand.dtype == torch.float32:
            strips = -(-4 * expand.out_channels * x.shape[2] * x.shape[3] // _MOST_AT_ONCE)
            if strips > 1:
                return self._in_strips(x, strips)
        out = x if expand is None else expand(x)
        out = self.depthwise_conv(out)
        projected: Tensor = self.project_conv(out, x if self.residual else None)
        return projected

    def _in_strips(self, x: Tensor, strips: int) -> Tensor:
        """`forward` in so many strips of rows. Equal to it, up to the last bit."""
        assert self.expand_conv is not None
        kernel, stride = self.kernel, self.stride
        padding = kernel // 2
        wanted = (x.shape[2] + 2 * padding - kernel) // stride + 1
        rows = -(-wanted // strips)
        parts = []
        for top in range(0, wanted, rows):
            end = min(top + rows, wanted)
            # The first rows of a strip's output see padding where the image goes on. They are not kept.
            first = max(0, top + -padding // stride)
            there = x[:, :, first * stride : (end - 1) * stride - padding + kernel]
            out: Tensor = self.depthwise_conv(self.expand_conv(as_channels_last(there)))
            kept = as_channels_last(out[:, :, top - first : end - first])
            own = as_channels_last(x[:, :, top:end]) if self.residual else None
            parts.append(self.project_conv(kept, own))
        return torch.cat(parts, 2)


class _FusedResNetBlock(nn.Module):
    """Equivalent of a `BasicBlock` or `Bottleneck` whose norms are folded."""

    def __init__(self, block: BasicBlock | Bottleneck) -> None:
        super().__init__()
        convs = [block.conv1, block.conv2] + ([block.conv3] if isinstance(block, Bottleneck) else [])
        self.convs = nn.ModuleList(FusedConv2d(conv, "relu") for conv in convs)
        down = block.downsample
        self.downsample = FusedConv2d(down[0]) if isinstance(down, nn.Sequential) else None

    def forward(self, x: Tensor) -> Tensor:
        x = _channels_last(x)
        out = x
        for conv in self.convs[:-1]:
            out = conv(out)
        last: Tensor = self.convs[-1](out, x if self.downsample is None else self.downsample(x))
        return last


class _FusedResidual(nn.Module):
    """Equivalent of a `ResidualBlock` of ordinary convolutions."""

    def __init__(self, block: ResidualBlock) -> None:
        super().__init__()
        assert isinstance(block.conv2, nn.Conv2d)
        self.dtype = block.conv2.weight.dtype
        self.conv1 = _parts(block.conv1, "relu")
        self.conv2 = FusedConv2d(block.conv2)
        self.downsample = None if block.downsample is None else _parts(block.downsample)

    def forward(self, z: Tensor) -> Tensor:
        """(N, in_dim, h, w) -> (N, out_dim, h, w)."""
        z = _channels_last(z.to(self.dtype))
        out: Tensor = self.conv2(
            self.conv1(torch.relu(z)), z if self.downsample is None else self.downsample(z)
        )
        return out

    def forward_shared(self, shared: Tensor, own: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """`forward` of cat(shared, own): (B, C_s, h, w), (B, O, C_o, h, w) -> (B*O, out_dim, h, w)."""
        b, o = own.shape[:2]
        shared, each = _channels_last(shared.to(self.dtype)), _channels_last(own.flatten(0, 1).to(self.dtype))
        assert isinstance(self.conv1, nn.ModuleDict)
        assert isinstance(self.downsample, nn.ModuleDict)
        once = self.conv1["shared"](torch.relu(shared)), self.downsample["shared"](shared)
        if b == 1 and divides(each):
            return in_parts(lambda part: self._joined(part, *once), each)
        of_image = [spread(x, counts).expand(b, o, *x.shape[1:]).flatten(0, 1) for x in once]
        return self._joined(each, *of_image)

    def _joined(self, own: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
        """Of (N, C_o, h, w) of objects, and what `conv1` and `downsample` make of their images."""
        assert isinstance(self.conv1, nn.ModuleDict)
        assert isinstance(self.downsample, nn.ModuleDict)
        inner = self.conv1["own"](torch.relu(own), inner)
        out: Tensor = self.conv2(inner, self.downsample["own"](own, outer))
        return out


def _parts(conv: nn.Module, activation: str | None = None) -> nn.Module:
    """The convolution, fused; a split one as a `ModuleDict`, activated after the addition of both parts."""
    if isinstance(conv, SplitConv2d):
        return nn.ModuleDict({"shared": FusedConv2d(conv.shared), "own": FusedConv2d(conv.own, activation)})
    return FusedConv2d(conv, activation)


def _channels_last(x: Tensor) -> Tensor:
    return as_channels_last(x.contiguous(memory_format=torch.channels_last))


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


def fuse(network: XMem) -> None:
    """Fuse what can be fused of a network prepared for inference on a CPU, in place.

    Args:
        network: its norms folded and its convolutions split and in channels-last layout, in float32 or
            bfloat16.
    """
    dtype = network.decoder.pred.weight.dtype
    if not can_fuse(dtype):
        return
    trunk = network.key_encoder
    if isinstance(trunk, EfficientNetLite0Trunk) and can_fuse(trunk.conv_stem.weight.dtype):
        network.key_encoder = FusedTrunk(trunk)  # type: ignore[assignment]
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, BasicBlock | Bottleneck):
                setattr(module, name, _FusedResNetBlock(child))
            elif isinstance(child, ResidualBlock) and not any(
                isinstance(m, WinogradConv2d) for m in child.modules()
            ):
                setattr(module, name, _FusedResidual(child))


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
            (FusedConv2d(conv, "relu")(x, x).float(), torch.relu(plain + x.float())),
        ]
    except (AttributeError, RuntimeError, TypeError) as error:
        logger.info("this PyTorch cannot convolve and activate in one pass: %s", error)
        return False
    rtol, atol = (1e-4, 1e-4) if dtype == torch.float32 else (0.02, 0.05)
    return all(torch.allclose(own, wanted, rtol=rtol, atol=atol) for own, wanted in pairs)


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32: it has AMX.

    AVX512_BF16 alone does not suffice: on an Intel Xeon with it and without AMX, as some virtual machines
    have, convolutions take 1.5 to 2 times as long as in float32.
    """
    try:
        found: Mapping[str, object] = torch.cpu.get_capabilities()
    except (AttributeError, RuntimeError):  # an older torch, or a CPU it can't tell about
        return False
    return bool(found.get("amx_bf16"))
