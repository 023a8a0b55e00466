"""Convolutions of 3x3 by Winograd's algorithm F(4x4, 3x3), for float32 inference on CPUs.

A tile of 4x4 outputs is computed from 6x6 inputs with 36 multiplications per pair of channels instead of 144
(Lavin and Gray 2016). The transforms before and after them are products with matrices of 36 x 36 and 16 x 36,
which take all channels of several tiles at once: a product is several times faster than the additions that it
consists of, each of which is a pass over memory. Activations and additions are part of the copies that the
transforms need anyway. So wide convolutions take a third to a half of oneDNN's time.

The price is memory, four times that of the weights, and rounding: with the points 0, +-sqrt(1/2) and
+-sqrt(2), half of the textbook's error, a result is wrong by a millionth of the results' deviation, where
oneDNN's are by two to five tenths of that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xmem_core.blocks import ResidualBlock, SplitConv2d, spread
from xmem_core.network import XMem

_TILE = 4
_SIDE = 6
# The finite points of interpolation; the last one is infinity.
_POINTS = (0.0, math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(2), -math.sqrt(2))
# Narrower convolutions gain too little.
_LEAST_CHANNELS = 256
# Tiles per product with the weights: fewer read the weights too often, more do not stay in the cache.
_TILES = 128
# Tiles per transform and thread: fewer are too little work, more do not stay in the second-level cache.
_PIECE = 16


def _transforms() -> tuple[Tensor, Tensor, Tensor]:
    """Of one dimension, float64: input (6, 6), weight (6, 3) and output (4, 6) transform (Toom and Cook)."""
    inputs, weights, outputs = (torch.zeros(n, m, dtype=torch.float64) for n, m in ((6, 6), (6, 3), (4, 6)))
    for k, point in enumerate(_POINTS):
        others = [other for other in _POINTS if other != point]
        inputs[k, :-1] = _polynomial(others)
        powers = torch.tensor([point**n for n in range(_TILE)], dtype=torch.float64)
        weights[k] = powers[:3] / math.prod(point - other for other in others)
        outputs[:, k] = powers
    inputs[-1] = _polynomial(_POINTS)
    weights[-1, -1] = outputs[-1, -1] = 1
    return inputs, weights, outputs


def _polynomial(roots: Sequence[float]) -> Tensor:
    """Coefficients of the product of (x - root), the constant one first."""
    found = torch.ones(1, dtype=torch.float64)
    for root in roots:
        shifted = torch.zeros(len(found) + 1, dtype=torch.float64)
        shifted[1:] = found
        shifted[:-1] -= root * found
        found = shifted
    return found


class _Piece(NamedTuple):
    """Neighbouring tiles of an image that are transformed at once: of rows and columns of tiles."""

    image: int
    top: int
    bottom: int
    left: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.bottom - self.top, self.right - self.left

    @property
    def tiles(self) -> int:
        return math.prod(self.shape)


def _strips(images: int, down: int, across: int) -> list[list[_Piece]]:
    """All tiles, in pieces, in strips for one product with the weights each."""
    most = _PIECE * torch.get_num_threads()
    parts = -(-across // most)
    columns = [(k * across // parts, (k + 1) * across // parts) for k in range(parts)]
    rows = max(1, most // across)
    pieces = [
        _Piece(i, top, min(top + rows, down), left, right)
        for i in range(images)
        for top in range(0, down, rows)
        for left, right in columns
    ]
    per = max(1, round(_TILES / max(piece.tiles for piece in pieces)))
    return [pieces[n : n + per] for n in range(0, len(pieces), per)]


class WinogradConv2d(nn.Module):
    """A 3x3 convolution with stride 1 and padding 1.

    Args:
        conv: such a convolution in float32, see `suits`; its weights are not kept.
    """

    weight: Tensor
    bias: Tensor | None
    to_tiles: Tensor
    from_tiles: Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        inputs, g, outputs = _transforms()
        given = conv.weight.double().permute(2, 3, 1, 0)  # 3, 3, C, C'
        weight = (torch.kron(g, g) @ given.flatten(0, 1).flatten(1)).float()
        self.register_buffer("weight", weight.view(36, *given.shape[2:]), persistent=False)
        self.register_buffer("bias", None if conv.bias is None else conv.bias.clone(), persistent=False)
        self.register_buffer("to_tiles", torch.kron(inputs, inputs).float(), persistent=False)
        self.register_buffer("from_tiles", torch.kron(outputs, outputs).float(), persistent=False)

    @staticmethod
    def suits(module: nn.Module | None) -> bool:
        """Whether the module is a convolution that this computes faster."""
        return (
            isinstance(module, nn.Conv2d)
            and module.kernel_size == (3, 3)
            and module.stride == (1, 1)
            and module.padding == (1, 1)
            and module.dilation == (1, 1)
            and module.groups == 1
            and min(module.in_channels, module.out_channels) >= _LEAST_CHANNELS
        )

    def forward(self, x: Tensor, add: Tensor | None = None, *, relu: bool = False) -> Tensor:
        """Convolve `x`, or `relu(x)`, and add `add`.

        Args:
            x: (N, C, h, w)
            add: (M, C', h, w), for N / M images in a row each.
            relu: apply ReLU to the input.

        Returns:
            (N, C', h, w) in channels-last layout.
        """
        n, channels, h, w = x.shape
        wanted = self.weight.shape[2]
        down, across = -(-h // _TILE), -(-w // _TILE)
        strips = _strips(n, down, across)
        most = max(piece.tiles for pieces in strips for piece in pieces)
        longest = max(sum(piece.tiles for piece in pieces) for pieces in strips)
        # One image at a time, and buffers that are used again: memory that the system has to provide first
        # costs more than the arithmetic on it.
        padded = x.new_empty(down * _TILE + 2, across * _TILE + 2, channels)
        for margin in (padded[:1], padded[h + 1 :], padded[:, :1], padded[:, w + 1 :]):
            margin.zero_()
        inputs = x.new_empty(36 * most * channels)
        tiles = x.new_empty(36 * longest * channels)
        products = x.new_empty(36 * longest * wanted)
        outputs = x.new_empty(16 * most * wanted)
        out = x.new_empty(n, down * _TILE, across * _TILE, wanted)
        image = -1
        for pieces in strips:
            count = sum(piece.tiles for piece in pieces)
            own_tiles = tiles[: 36 * count * channels].view(36, count, channels)
            start = 0
            for piece in pieces:
                if piece.image != image:
                    image = piece.image
                    inside = padded[1 : h + 1, 1 : w + 1]
                    if relu:
                        torch.clamp_min(x[image].permute(1, 2, 0), 0, out=inside)
                    else:
                        inside.copy_(x[image].permute(1, 2, 0))
                end = start + piece.tiles
                self._to_tiles(padded, piece, inputs, own_tiles[:, start:end])
                start = end
            own_products = products[: 36 * count * wanted].view(36, count, wanted)
            torch.bmm(own_tiles, self.weight, out=own_products)
            start = 0
            for piece in pieces:
                end = start + piece.tiles
                self._from_tiles(own_products[:, start:end], piece, outputs, out)
                if add is not None:
                    rows = slice(_TILE * piece.top, min(_TILE * piece.bottom, h))
                    columns = slice(_TILE * piece.left, min(_TILE * piece.right, w))
                    added = add[piece.image * len(add) // n, :, rows, columns].permute(1, 2, 0)
                    out[piece.image, rows, columns].add_(added)
                start = end
        # Without the rows and columns of incomplete tiles: the next operations are faster on whole rows.
        return out[:, :h, :w].contiguous().permute(0, 3, 1, 2)

    def _to_tiles(self, padded: Tensor, piece: _Piece, inputs: Tensor, tiles: Tensor) -> None:
        """Transform the inputs of a piece: (36, tiles, C)."""
        channels = padded.shape[2]
        rows = padded[_TILE * piece.top : _TILE * piece.bottom + 2]
        seen = rows[:, _TILE * piece.left : _TILE * piece.right + 2]
        own = inputs[: 36 * piece.tiles * channels]
        own.view(_SIDE, _SIDE, *piece.shape, channels).copy_(
            seen.unfold(0, _SIDE, _TILE).unfold(1, _SIDE, _TILE).permute(3, 4, 0, 1, 2)
        )
        torch.mm(self.to_tiles, own.view(36, -1), out=tiles.view(36, -1))

    def _from_tiles(self, products: Tensor, piece: _Piece, outputs: Tensor, out: Tensor) -> None:
        """Transform the products of a piece, (36, tiles, C'), and put them in their place."""
        wanted = products.shape[2]
        own = outputs[: 16 * piece.tiles * wanted]
        torch.mm(self.from_tiles, products.view(36, -1), out=own.view(16, -1))
        rows = out[piece.image, _TILE * piece.top : _TILE * piece.bottom]
        place = rows[:, _TILE * piece.left : _TILE * piece.right].unflatten(1, (-1, _TILE))
        place = place.unflatten(0, (-1, _TILE)).permute(1, 3, 0, 2, 4)
        found = own.view(_TILE, _TILE, *piece.shape, wanted)
        if self.bias is None:
            place.copy_(found)
        else:
            torch.add(found, self.bias, out=place)


class _Residual(nn.Module):
    """A `ResidualBlock` of which all convolutions are computed so.

    Args:
        block: one without other convolutions, see `suits`.
    """

    def __init__(self, block: ResidualBlock) -> None:
        super().__init__()
        self.conv1, self.conv2, self.downsample = block.conv1, block.conv2, block.downsample

    @staticmethod
    def suits(module: nn.Module) -> bool:
        """Whether the module is such a block."""
        if not isinstance(module, ResidualBlock):
            return False
        convs = [m for m in module.children() if not isinstance(m, SplitConv2d)]
        convs += [part for m in module.children() if isinstance(m, SplitConv2d) for part in m.children()]
        return all(isinstance(conv, WinogradConv2d) for conv in convs)

    def forward(self, z: Tensor) -> Tensor:
        """(N, in_dim, h, w) -> (N, out_dim, h, w)."""
        out: Tensor = self.conv1(z, relu=True)
        out = self.conv2(out, z if self.downsample is None else self.downsample(z), relu=True)
        return out

    def forward_shared(self, shared: Tensor, own: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """`forward` of cat(shared, own): (B, C_s, h, w), (B, O, C_o, h, w) -> (B*O, out_dim, h, w)."""
        assert isinstance(self.conv1, SplitConv2d)
        assert isinstance(self.downsample, SplitConv2d)
        each = own.flatten(0, 1)
        once = self.conv1.shared(shared, relu=True), self.downsample.shared(shared)
        inner, beside = once if counts is None else (spread(x, counts).squeeze(1) for x in once)
        out: Tensor = self.conv1.own(each, inner, relu=True)
        out = self.conv2(out, self.downsample.own(each, beside), relu=True)
        return out


def use_winograd(network: XMem) -> None:
    """Compute the decoder's wide 3x3 convolutions by Winograd's algorithm, in place.

    Those of the encoders run on memory frames only, or are narrow: they gain too little for the memory.
    """
    _replace(network.decoder, WinogradConv2d)
    _replace(network.decoder, _Residual)


def _replace(root: nn.Module, kind: type[WinogradConv2d | _Residual]) -> None:
    for module in list(root.modules()):
        for name, child in list(module.named_children()):
            if kind.suits(child):
                setattr(module, name, kind(child))  # type: ignore[arg-type]
