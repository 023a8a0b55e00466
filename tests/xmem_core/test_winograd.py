"""Winograd's algorithm gives the results of the convolution itself."""

from __future__ import annotations

import pytest
import torch
from support.small_net import SMALL, small_model
from support.threads import torch_threads
from torch import Tensor, nn

from xmem_core import ModelConfig, VideoSegmenter, XMem
from xmem_core.blocks import ResidualBlock
from xmem_core.winograd import WinogradConv2d, use_winograd


def convolution(inputs: int, outputs: int, *, bias: bool = True) -> nn.Conv2d:
    torch.manual_seed(inputs + outputs)
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)
    return conv.requires_grad_(False)


def error(found: Tensor, exact: Tensor) -> float:
    """Root mean square of the error over the deviation of the results."""
    return float((found.double() - exact).square().mean().sqrt() / exact.std())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (4, 8), (5, 7), (13, 30), (37, 22)])
def test_it_computes_the_convolution(size: tuple[int, int], threads: int) -> None:
    """Sizes that are multiples of a tile and others, several strips, both memory layouts."""
    conv = convolution(24, 40)
    x = torch.randn(3, 24, *size)
    exact = conv.double()(x.double())
    own = WinogradConv2d(conv.float())
    with torch_threads(threads):
        for layout in (torch.contiguous_format, torch.channels_last):
            found = own(x.contiguous(memory_format=layout))
            assert found.shape == exact.shape
            assert found.permute(0, 2, 3, 1).is_contiguous()
            assert error(found, exact) < 3e-6


def test_without_bias() -> None:
    conv = convolution(16, 16, bias=False)
    x = torch.randn(1, 16, 9, 9)
    assert torch.allclose(WinogradConv2d(conv)(x), conv(x), atol=1e-5)


@pytest.mark.parametrize("size", [(8, 12), (5, 7)])
def test_activation_and_addition(size: tuple[int, int]) -> None:
    """ReLU before it, what is added after it: for each image, or for several in a row."""
    conv = WinogradConv2d(convolution(16, 24))
    x = torch.randn(6, 16, *size)
    for images in (6, 2):
        add = torch.randn(images, 24, *size)
        wanted = conv(torch.relu(x)) + add.repeat_interleave(6 // images, 0)
        torch.testing.assert_close(conv(x, add, relu=True), wanted, rtol=0, atol=1e-5)


def test_long_rows_of_tiles_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece of several tiles in a row, of several rows, and of a single tile."""
    conv = convolution(16, 24)
    x = torch.randn(2, 16, 21, 70)
    exact = conv.double()(x.double())
    own = WinogradConv2d(conv.float())
    for piece, tiles in ((1, 1), (5, 7), (40, 50), (1000, 2000)):
        monkeypatch.setattr("xmem_core.winograd._PIECE", piece)
        monkeypatch.setattr("xmem_core.winograd._TILES", tiles)
        assert error(own(x), exact) < 3e-6


def test_its_error_is_half_of_the_textbook_points() -> None:
    """With 0, +-1 and +-2 as points of interpolation the error is 2.6e-6 here."""
    conv = convolution(256, 64)
    x = torch.relu(torch.randn(1, 256, 24, 24))
    exact = conv.double()(x.double())
    assert error(WinogradConv2d(conv.float())(x), exact) < 1.8e-6


def test_an_image_does_not_depend_on_the_others_of_its_batch() -> None:
    conv = WinogradConv2d(convolution(16, 24))
    x = torch.randn(3, 16, 17, 33)
    together = conv(x)
    for i in range(3):
        torch.testing.assert_close(conv(x[i : i + 1])[0], together[i], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("module", "suits"),
    [
        (nn.Conv2d(256, 256, 3, padding=1), True),
        (nn.Conv2d(256, 256, 3), False),
        (nn.Conv2d(256, 256, 3, 2, 1), False),
        (nn.Conv2d(256, 256, 1), False),
        (nn.Conv2d(256, 256, 3, padding=2, dilation=2), False),
        (nn.Conv2d(256, 256, 3, padding=1, groups=256), False),
        (nn.Conv2d(128, 256, 3, padding=1), False),
        (nn.Conv2d(256, 1, 3, padding=1), False),
        (nn.BatchNorm2d(256), False),
        (None, False),
    ],
)
def test_which_convolutions_suit(module: nn.Module | None, suits: bool) -> None:
    assert WinogradConv2d.suits(module) is suits


def kinds(segmenter: VideoSegmenter) -> int:
    """How many of the network's convolutions are computed so."""
    return sum(isinstance(m, WinogradConv2d) for m in segmenter._network.modules())


def test_only_the_published_decoder_in_float32_uses_it() -> None:
    model = XMem(ModelConfig())
    # Two split ones and three others of the fusion, four and three of the up-blocks.
    assert kinds(VideoSegmenter(model)) == 4 + 3 + 4 + 3
    assert kinds(VideoSegmenter(model, dtype=torch.bfloat16)) == 0
    assert kinds(VideoSegmenter(small_model(SMALL))) == 0
    assert not any(isinstance(m, WinogradConv2d) for m in model.modules())


def test_a_network_gives_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xmem_core.winograd._LEAST_CHANNELS", 8)
    model = small_model(SMALL).requires_grad_(False)
    scales = tuple(
        torch.randn(1, c, 4 * s, 5 * s) for c, s in zip(model.key_encoder.channels, (1, 2, 4), strict=True)
    )
    readout = torch.randn(1, 2, SMALL.value_dim, 4, 5)
    hidden = torch.randn(1, 2, SMALL.hidden_dim, 4, 5)
    plain = model.decode(scales, readout, hidden)  # type: ignore[arg-type]
    model.split_shared()
    use_winograd(model)
    assert sum(isinstance(m, WinogradConv2d) for m in model.decoder.modules()) > 10
    assert not any(isinstance(m, ResidualBlock) for m in model.decoder.modules())
    fast = model.decode(scales, readout, hidden)  # type: ignore[arg-type]
    for a, b in zip(fast, plain, strict=True):
        assert a is not None
        assert b is not None
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
