"""Building blocks of the encoders and the decoder.

Per-object tensors are (B, O, C, h, w); convolutions take them as (B*O, C, h, w). Features that all objects of
an image share are (B, C, h, w) and are convolved once: a convolution over the concatenation of shared and
per-object channels is the sum of the convolutions over each part.

Images of several streams have different numbers of objects. Their objects are then (N, 1, C, h, w), those of
the first image first, and `counts` says how many each image has; None: each has O.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmem_core.aside import in_parts


class SplitConv2d(nn.Module):
    """A convolution of cat(shared, own) as the sum of two, which `conv_shared` applies. Only for inference.

    Args:
        conv: takes C_s + C_o channels.
        shared: C_s.
    """

    def __init__(self, conv: nn.Conv2d, shared: int) -> None:
        super().__init__()
        self.shared = _part(conv, slice(0, shared), bias=conv.bias)
        self.own = _part(conv, slice(shared, None), bias=None)


def _part(conv: nn.Conv2d, channels: slice, bias: Tensor | None) -> nn.Conv2d:
    """The convolution over a part of the input channels, with weights in the same layout."""
    nhwc = conv.weight.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if nhwc else torch.contiguous_format
    weight = conv.weight[:, channels].contiguous(memory_format=layout)
    part = copy.copy(conv)
    parameters = {"weight": weight, "bias": bias}
    part._parameters = {
        name: None if tensor is None else nn.Parameter(tensor, requires_grad=False)
        for name, tensor in parameters.items()
    }
    part.in_channels = weight.shape[1]
    return part


def spread(shared: Tensor, counts: Sequence[int] | None) -> Tensor:
    """What is shared by an image's objects, to be added to what is theirs.

    Args:
        shared: (B, C, h, w)
        counts: numbers of objects, see the module.

    Returns:
        (B, 1, C, h, w), a view; with `counts` (N, 1, C, h, w) in the same layout.
    """
    if counts is None:
        return shared.unsqueeze(1)
    nhwc = shared.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if nhwc else torch.contiguous_format
    size = (sum(counts), *shared.shape[1:])
    out = torch.empty(size, dtype=shared.dtype, device=shared.device, memory_format=layout)
    for part, image in zip(out.split(list(counts)), shared, strict=True):
        part.copy_(image)
    return out.unsqueeze(1)


def conv_shared(conv: nn.Module, shared: Tensor, own: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """`conv` of cat(shared, own) for every object, without repeating the work on what is shared.

    Args:
        conv: a convolution that takes C_s + C_o channels, whole or split after C_s.
        shared: (B, C_s, h, w), the image's.
        own: (B, O, C_o, h, w), the objects'.
        counts: numbers of objects, see the module.

    Returns:
        (B, O, C, h, w)
    """
    b, o = own.shape[:2]
    if isinstance(conv, SplitConv2d):
        for_each: Tensor = conv.own(own.flatten(0, 1))
        return for_each.view(b, o, *for_each.shape[1:]).add_(spread(conv.shared(shared), counts))
    assert isinstance(conv, nn.Conv2d)
    split = shared.shape[1]
    from_shared = F.conv2d(shared, conv.weight[:, :split], conv.bias, conv.stride, conv.padding)
    each = own.flatten(0, 1)
    if conv.weight.is_contiguous(memory_format=torch.channels_last):
        # A slice of the weight does not show the weight's layout. Without this, later layers would run
        # in the input's layout, with conversions between the two.
        each = each.contiguous(memory_format=torch.channels_last)
    from_own = F.conv2d(each, conv.weight[:, split:], None, conv.stride, conv.padding)
    # In place: allocating a new tensor of that size costs more than the addition.
    return from_own.view(b, o, *from_own.shape[1:]).add_(spread(from_shared, counts))


def flattened(own: Tensor) -> Tensor:
    """(B, O, C, h, w) -> (B * O, C, h, w), in channels-last layout so that torch sees it if it is in that."""
    return as_channels_last(own.flatten(0, 1))


def as_channels_last(x: Tensor) -> Tensor:
    """(N, C, h, w) of which torch recognises the layout, if it is channels-last.

    A view of a single image can have any stride along N. Torch's kernels for channels-last images look at
    this stride too: they would convert the image to the other layout, and the next convolution would convert
    it back, which takes several times as long as what they compute.
    """
    n, channels, height, width = x.shape
    strides = (channels * height * width, 1, width * channels, channels)
    if n == 1 and x.stride() != strides and x.is_contiguous(memory_format=torch.channels_last):
        return x.as_strided(x.shape, strides)
    return x


class ResidualBlock(nn.Module):
    """relu, conv1, relu, conv2, plus the input; a `downsample`, 3x3 unless given, brings it to `out_dim`
    channels.
    """

    def __init__(self, in_dim: int, out_dim: int, *, shortcut_kernel: int = 3) -> None:
        super().__init__()
        self.downsample: nn.Conv2d | None = None
        if in_dim != out_dim:
            self.downsample = nn.Conv2d(in_dim, out_dim, shortcut_kernel, padding=shortcut_kernel // 2)
        self.conv1 = nn.Conv2d(in_dim, out_dim, 3, padding=1)
        self.conv2 = nn.Conv2d(out_dim, out_dim, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(N, in_dim, h, w) -> (N, out_dim, h, w)."""
        residual: Tensor = self.conv2(torch.relu_(self.conv1(torch.relu(z))))
        return residual + (z if self.downsample is None else self.downsample(z))

    def forward_shared(self, shared: Tensor, own: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """`forward` of cat(shared, own): (B, C_s, h, w), (B, O, C_o, h, w) -> (B*O, out_dim, h, w)."""
        r = conv_shared(self.conv1, torch.relu(shared), torch.relu(own), counts).flatten(0, 1)
        r = self.conv2(torch.relu_(r))
        if self.downsample is None:
            b, o = own.shape[:2]
            z = torch.cat([spread(shared, counts).expand(b, o, -1, -1, -1), own], 2).flatten(0, 1)
        else:
            z = conv_shared(self.downsample, shared, own, counts).flatten(0, 1)
        return torch.add(r, z)


class ChannelGate(nn.Module):
    """CBAM's attention over channels (Woo et al. 2018, section 3)."""

    def __init__(self, dim: int, reduction: int = 16) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Flatten(), nn.Linear(dim, dim // reduction), nn.ReLU(), nn.Linear(dim // reduction, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        weight = self.mlp(x.mean((2, 3), keepdim=True)) + self.mlp(x.amax((2, 3), keepdim=True))
        return x * torch.sigmoid(weight)[:, :, None, None]


class SpatialGate(nn.Module):
    """CBAM's attention over positions: from the maximum and the mean over channels, in this order."""

    def __init__(self) -> None:
        super().__init__()
        # A separate module only to match the names of the published state dict.
        self.spatial = nn.ModuleDict({"conv": nn.Conv2d(2, 1, 7, padding=3)})

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.spatial["conv"](maps))


class CBAM(nn.Module):
    """Convolutional block attention: the channel gate, then the spatial gate."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ChannelGate = ChannelGate(dim)
        self.SpatialGate = SpatialGate()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.SpatialGate(self.ChannelGate(x))
        return out


class FeatureFusion(nn.Module):
    """Fuses an image's features with those of each of its objects (paper section 3.2, figure 4)."""

    def __init__(self, shared_dim: int, own_dim: int, out_dim: int) -> None:
        super().__init__()
        self.block1 = ResidualBlock(shared_dim + own_dim, out_dim)
        self.attention = CBAM(out_dim)
        self.block2 = ResidualBlock(out_dim, out_dim)

    def forward(self, shared: Tensor, own: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """(B, C_s, h, w), (B, O, C_o, h, w) -> (B, O, out_dim, h, w); `counts`: see the module."""
        z = self.block1.forward_shared(shared, own, counts)
        # Not the attention: last bits of its matrix products depend on the number of objects.
        out = in_parts(self.block2, z + self.attention(z))
        return out.view(*own.shape[:2], *out.shape[1:])


class ChannelAttentionBlock(nn.Module):
    """A residual block of which each channel is weighted by its and its neighbours' means (ECA, Wang et al.
    2020), in place of CBAM. Cutie's.
    """

    def __init__(self, dim: int, neighbours: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv = nn.Conv1d(1, 1, neighbours, padding=neighbours // 2, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        """(N, dim, h, w) -> the same."""
        residual = self.conv2(torch.relu_(self.conv1(torch.relu(z))))
        weight = torch.sigmoid(self.conv(residual.mean((2, 3)).unsqueeze(1)))  # N, 1, dim
        return torch.add(z, residual * weight.transpose(1, 2).unsqueeze(3))


def _gate_convolution(in_dim: int, hidden_dim: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_dim + hidden_dim, 3 * hidden_dim, 3, padding=1)
    # Small initial weights, so that an untrained gate neither saturates nor forgets at once.
    nn.init.xavier_normal_(conv.weight)
    return conv


def gated_update(transform: nn.Conv2d, x: Tensor, hidden: Tensor) -> Tensor:
    """The sensory memory's recurrent update, as the published model computes it.

    It resembles a GRU but is not one: the forget gate scales h outside the tanh, and the candidate n does
    not see the gated state. The published weights were trained so; do not "correct" it.

    Args:
        transform: 3x3 convolution to 3 C_h channels: forget, update, candidate.
        x: (B, O, C, h, w)
        hidden: (B, O, C_h, h, w)

    Returns:
        the new hidden, (B, O, C_h, h, w).
    """
    gates = transform(torch.cat([x, hidden], 2).flatten(0, 1))
    forget, update, new = gates.view(*hidden.shape[:2], *gates.shape[1:]).chunk(3, 2)
    renew = torch.sigmoid(update)
    return torch.sigmoid(forget) * hidden * (1 - renew) + renew * torch.tanh(new)


class GatedUpdate(nn.Module):
    """`gated_update` from one input: the deep update, from the memory value."""

    def __init__(self, in_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.transform = _gate_convolution(in_dim, hidden_dim)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """x (B, O, C, h, w) and hidden (B, O, C_h, h, w) -> the new hidden."""
        return gated_update(self.transform, x, hidden)


class SensoryUpdate(nn.Module):
    """`gated_update` from the decoder's three scales, summed at stride 16: the update of every frame."""

    def __init__(self, dims: tuple[int, int, int], mid_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.g16_conv = nn.Conv2d(dims[0], mid_dim, 1)
        self.g8_conv = nn.Conv2d(dims[1], mid_dim, 1)
        self.g4_conv = nn.Conv2d(dims[2] + 1, mid_dim, 1)
        self.transform = _gate_convolution(mid_dim, hidden_dim)

    def summed(self, g16: Tensor, g8: Tensor, g4: Tensor, logit: Tensor) -> Tensor:
        """Per-object maps (N, C, ...) at strides 16, 8 and 4 and logits at 4 -> their sum (N, C, h, w)."""
        x = self.g16_conv(g16)
        x = x + self.g8_conv(F.avg_pool2d(g8, 2))
        # Pooled before they are put together: g4 is large.
        summed: Tensor = x + self.g4_conv(torch.cat([F.avg_pool2d(g4, 4), F.avg_pool2d(logit, 4)], 1))
        return summed

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """x (B*O, C, h, w), from `summed`, and hidden (B, O, C_h, h, w) -> the new hidden."""
        return gated_update(self.transform, x.view(*hidden.shape[:2], *x.shape[1:]), hidden)


class UpBlock(nn.Module):
    """Doubles the resolution and adds the image's features of that scale."""

    def __init__(self, skip_dim: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.skip_conv = nn.Conv2d(skip_dim, in_dim, 3, padding=1)
        self.out_conv = ResidualBlock(in_dim, out_dim)

    def forward(self, skip: Tensor, g: Tensor) -> Tensor:
        """skip (B, C_s, 2h, 2w), g (B, O, in_dim, h, w) -> (B, O, out_dim, 2h, 2w)."""
        return self.joined(self.skip_conv(skip), g)

    def joined(self, skip: Tensor, g: Tensor) -> Tensor:
        """`forward` with what `skip_conv` makes of the image's features: (B, in_dim, 2h, 2w)."""
        b, o = g.shape[:2]
        up = F.interpolate(flattened(g), scale_factor=2, mode="bilinear", align_corners=False)
        # Autocast interpolates in float32 on a CPU.
        up = up.to(skip.dtype).view(b, o, *up.shape[1:]).add_(skip.unsqueeze(1))
        out: Tensor = self.out_conv(flattened(up))
        return out.view(b, o, *out.shape[1:])
