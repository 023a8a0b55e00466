"""Convolutions of 3x3 by Winograd's algorithm F(4x4, 3x3), for float32 inference on CPUs.

A tile of 4x4 outputs is computed from 6x6 inputs with 36 multiplications per pair of channels instead of 144
(Lavin and Gray 2016). The transforms before and after the products are additions over whole rows of
channels, so that wide convolutions take half to two thirds of oneDNN's time. The price is memory, four times
that of the weights, and rounding: with the points 0, +-sqrt(1/2) and +-sqrt(2), half of the textbook's error,
a result is wrong by a millionth of the results' deviation, where oneDNN's are by two to five tenths of that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from xmem_core.network import XMem

_TILE = 4
_SIDE = 6
# The points of interpolation besides 0 and infinity: +-_A and +-_B. _A * _B = 1 saves a multiplication.
_A, _B = math.sqrt(0.5), math.sqrt(2)
_A2, _B2 = 0.5, 2.0
# Narrower convolutions are bound by the transforms.
_LEAST_CHANNELS = 256
# Tiles per matrix product: fewer read the weights too often, more do not stay in the cache.
_TILES = 128
# Rows of tiles per transform with several threads; one row is too little work to share.
_ROWS = 4


def _weight_transform() -> Tensor:
    """(6, 3) float64: G of U = G g G^T, scaled so that `_to_outputs` needs few multiplications."""
    rows = [[1.0, 0.0, 0.0]]
    for point, square, other in ((_A, _A2, _B2), (-_A, _A2, _B2), (_B, _B2, _A2), (-_B, _B2, _A2)):
        scale = abs(point) / (2 * square * (square - other))
        rows.append([scale, scale * point, scale * square])
    rows.append([0.0, 0.0, 1.0])
    return torch.tensor(rows, dtype=torch.float64)


def _from_inputs(d: Sequence[Tensor], out: Sequence[Tensor], s: Tensor, t: Tensor) -> None:
    """One dimension of the input transform: six rows `d` to six rows `out`; `s`, `t` are scratch."""
    torch.add(d[4], d[2], alpha=-_B2, out=s)
    torch.add(d[3], d[1], alpha=-_B2, out=t)
    torch.add(s, t, alpha=_A, out=out[1])
    torch.add(s, t, alpha=-_A, out=out[2])
    torch.add(s, d[2], alpha=-_A2, out=out[0])
    out[0].add_(d[0])
    torch.add(d[4], d[2], alpha=-_A2, out=s)
    torch.add(d[3], d[1], alpha=-_A2, out=t)
    torch.add(s, t, alpha=_B, out=out[3])
    torch.add(s, t, alpha=-_B, out=out[4])
    torch.add(d[5], d[3], alpha=-_A2, out=out[5])
    out[5].add_(t, alpha=-_B2)


def _to_outputs(m: Sequence[Tensor], out: Sequence[Tensor], s: Tensor, t: Tensor) -> None:
    """One dimension of the output transform: six rows `m` to four rows `out`; `s`, `t` are scratch."""
    torch.add(m[1], m[2], out=s)
    torch.add(m[3], m[4], out=t)
    torch.add(m[0], s, alpha=1 / _A, out=out[0])
    out[0].add_(t, alpha=1 / _B)
    torch.mul(s, _A, out=out[2])
    out[2].add_(t, alpha=_B)
    torch.sub(m[1], m[2], out=s)
    torch.sub(m[3], m[4], out=t)
    torch.add(s, t, out=out[1])
    torch.add(m[5], s, alpha=_A2, out=out[3])
    out[3].add_(t, alpha=_B2)


class WinogradConv2d(nn.Module):
    """A 3x3 convolution with stride 1 and padding 1.

    Args:
        conv: such a convolution in float32, see `suits`; its weights are not kept.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        g = _weight_transform()
        weight = torch.einsum("ia,ocab,jb->ijco", g, conv.weight.double(), g).float()
        self.register_buffer("weight", weight.flatten(0, 1).contiguous(), persistent=False)
        self.register_buffer("bias", None if conv.bias is None else conv.bias.clone(), persistent=False)

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

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, C', h, w), in channels-last layout."""
        n, channels, h, w = x.shape
        wanted = self.weight.shape[2]
        down, across = -(-h // _TILE), -(-w // _TILE)
        padded = x.new_empty(n, down * _TILE + 2, across * _TILE + 2, channels)
        padded[:, 0].zero_()
        padded[:, h + 1 :].zero_()
        padded[:, :, 0].zero_()
        padded[:, :, w + 1 :].zero_()
        padded[:, 1 : h + 1, 1 : w + 1].copy_(x.permute(0, 2, 3, 1))
        out = x.new_empty(n, down * _TILE, across * _TILE, wanted)
        rows = 1 if torch.get_num_threads() == 1 else _ROWS
        # (image, first row of tiles, end) of each transform, and these in strips of about _TILES tiles.
        spans = [(i, a, min(a + rows, down)) for i in range(n) for a in range(0, down, rows)]
        per = max(1, round(_TILES / (across * rows)))
        work = _Workspace(x, per * rows, rows, across, channels, wanted)
        for first in range(0, len(spans), per):
            self._strip(padded, out, spans[first : first + per], work)
        return out[:, :h, :w].permute(0, 3, 1, 2)

    def _strip(
        self, padded: Tensor, out: Tensor, spans: Sequence[tuple[int, int, int]], work: _Workspace
    ) -> None:
        across, channels, wanted = work.across, work.channels, self.weight.shape[2]
        count = sum(end - first for _, first, end in spans)
        tiles = work.tiles[: 36 * count * across * channels].view(_SIDE, _SIDE, count, across, channels)
        start = 0
        for i, first, end in spans:
            many = end - first
            image = padded[i]
            rows = [image[_TILE * first + j : _TILE * (end - 1) + j + 1 : _TILE] for j in range(_SIDE)]
            lines = work.lines[:, :many]
            _from_inputs(rows, lines.unbind(0), *work.line_scratch[:, :many])
            columns = [lines[:, :, j : _TILE * (across - 1) + j + 1 : _TILE] for j in range(_SIDE)]
            _from_inputs(
                columns, list(tiles[:, :, start : start + many].unbind(1)), *work.tile_scratch[:, :, :many]
            )
            start += many
        products = work.products[: 36 * count * across * wanted].view(36, count * across, wanted)
        torch.bmm(tiles.view(36, count * across, channels), self.weight, out=products)
        products = products.view(_SIDE, _SIDE, count, across, wanted)
        start = 0
        for i, first, end in spans:
            many = end - first
            halves = work.halves[:, :, :many]
            _to_outputs(
                products[:, :, start : start + many].unbind(0),
                halves.unbind(0),
                *work.product_scratch[:, :, :many],
            )
            target = out[i, _TILE * first : _TILE * end].view(many, _TILE, across, _TILE, wanted)
            own = [target[:, :, :, j].transpose(0, 1) for j in range(_TILE)]
            _to_outputs(halves.unbind(1), own, *work.half_scratch[:, :, :many])
            if self.bias is not None:
                target.add_(self.bias)
            start += many


class _Workspace:
    """Buffers of one call, used strip after strip."""

    def __init__(self, x: Tensor, strip: int, rows: int, across: int, channels: int, wanted: int) -> None:
        self.across, self.channels = across, channels
        width = across * _TILE + 2
        self.tiles = x.new_empty(36 * strip * across * channels)
        self.products = x.new_empty(36 * strip * across * wanted)
        self.lines = x.new_empty(_SIDE, rows, width, channels)
        self.line_scratch = x.new_empty(2, rows, width, channels)
        self.tile_scratch = x.new_empty(2, _SIDE, rows, across, channels)
        self.halves = x.new_empty(_TILE, _SIDE, rows, across, wanted)
        self.product_scratch = x.new_empty(2, _SIDE, rows, across, wanted)
        self.half_scratch = x.new_empty(2, _TILE, rows, across, wanted)


def use_winograd(network: XMem) -> None:
    """Compute the decoder's wide 3x3 convolutions by Winograd's algorithm, in place.

    Those of the encoders run on memory frames only, or are narrow: they gain too little for the memory.
    """
    for module in list(network.decoder.modules()):
        for name, child in list(module.named_children()):
            if WinogradConv2d.suits(child):
                assert isinstance(child, nn.Conv2d)
                setattr(module, name, WinogradConv2d(child))
