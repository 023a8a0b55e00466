"""The fused trunk gives the results of the unfused one."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.small_net import SMALL, small_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from xmem_core import MemoryConfig, ModelConfig, VideoSegmenter, XMem, fused
from xmem_core.backbones import BasicBlock, Bottleneck, EfficientNetLite0Trunk, fold_batch_norms
from xmem_core.blocks import ResidualBlock
from xmem_core.fused import FusedConv2d, FusedTrunk, can_fuse, fuse

DTYPES = (torch.float32, torch.bfloat16)


def needs(dtype: torch.dtype) -> pytest.MarkDecorator:
    """Skips where this PyTorch or CPU cannot fuse in this precision."""
    return pytest.mark.skipif(not can_fuse(dtype), reason=f"this PyTorch or CPU cannot fuse in {dtype}")


needs_float32, needs_bfloat16 = map(needs, DTYPES)
EACH = [pytest.param(dtype, marks=needs(dtype)) for dtype in DTYPES]


def trunk(dtype: torch.dtype) -> EfficientNetLite0Trunk:
    """Random weights, with norms that have the statistics of random pictures."""
    torch.manual_seed(3)
    network = EfficientNetLite0Trunk()
    with torch.no_grad():
        for _ in range(20):
            network.train()(torch.randn(2, 3, 64, 64))
    fold_batch_norms(network.eval().requires_grad_(False))
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return network.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_this_machine_can_fuse(dtype: torch.dtype) -> None:
    """The PyTorch pinned in constraints.txt has the operators; without them, speed is lost silently.

    For bfloat16, oneDNN has them on CPUs with AVX-512 only.
    """
    # Untyped in torch's stubs.
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert can_fuse(dtype) or (dtype == torch.bfloat16 and not supported)


@needs_float32
def test_in_float32_it_computes_what_the_trunk_does_up_to_rounding() -> None:
    plain = trunk(torch.float32)
    fast = FusedTrunk(copy.deepcopy(plain))
    with torch.no_grad():
        for size in ((96, 64), (64, 96)):
            image = torch.randn(1, 3, *size).contiguous(memory_format=torch.channels_last)
            for wanted, own in zip(plain(image), fast(image), strict=True):
                assert own.dtype == torch.float32
                assert (own - wanted).abs().max() < 1e-5 * wanted.abs().max()


@needs_float32
@pytest.mark.parametrize("height", [96, 80, 112])
def test_strips_give_the_same_bits(height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = FusedTrunk(trunk(torch.float32))
    image = torch.randn(1, 3, height, 64).contiguous(memory_format=torch.channels_last)
    done: list[int] = []
    in_strips = fused._FusedInvertedResidual._in_strips

    def counted(self: fused._FusedInvertedResidual, x: torch.Tensor, strips: int) -> torch.Tensor:
        done.append(strips)
        return in_strips(self, x, strips)

    monkeypatch.setattr(fused._FusedInvertedResidual, "_in_strips", counted)
    with torch.no_grad():
        whole = fast(image)
        assert not done
        for size in (100_000, 20_000):
            monkeypatch.setattr(fused, "_MOST_AT_ONCE", size)
            for wanted, own in zip(whole, fast(image), strict=True):
                assert torch.equal(own, wanted)
                assert own.is_contiguous(memory_format=torch.channels_last)
    assert len(set(done)) > 5  # of all kernels and strides, in two and more strips


@needs_float32
def test_no_large_block_is_new_memory() -> None:
    """glibc takes blocks of 32 MiB and more from the system each time; `xmem-lite` at 512 had one."""
    sizes = []

    class Blocks(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes.append(out.nbytes)
            return out

    fast = FusedTrunk(trunk(torch.float32))
    with torch.no_grad(), Blocks():  # type: ignore[no-untyped-call]
        fast(torch.zeros(1, 3, 512, 688).contiguous(memory_format=torch.channels_last))
    assert max(sizes) < 32 << 20


@needs_bfloat16
def test_it_computes_what_the_trunk_does() -> None:
    whole = trunk(torch.float32)
    plain = copy.deepcopy(whole).bfloat16()
    fast = FusedTrunk(copy.deepcopy(plain))
    assert fast.channels == whole.channels
    with torch.no_grad():
        for size in ((96, 64), (64, 96), (96, 64)):  # a network sees streams of several sizes
            image = torch.randn(1, 3, *size).contiguous(memory_format=torch.channels_last)
            exact, rounded, own = whole(image), plain(image.bfloat16()), fast(image)
            for e, r, o in zip(exact, rounded, own, strict=True):
                assert o.shape == e.shape
                assert o.dtype == torch.bfloat16
                # No further from the truth than bfloat16 is without fusing: it is rounded less often.
                assert (o - e).abs().mean() < 1.1 * (r - e).abs().mean() + 1e-6
                assert (o - e).abs().mean() < 0.03 * e.abs().mean()


def channels_last(conv: nn.Conv2d) -> nn.Conv2d:
    """Without gradients, in bfloat16, channels last."""
    prepared: Any = conv.requires_grad_(False).bfloat16()
    made: nn.Conv2d = prepared.to(memory_format=torch.channels_last)
    return made


@needs_bfloat16
def test_an_activation_is_not_lost_and_an_addition_is_added() -> None:
    conv = channels_last(nn.Conv2d(8, 8, 1))
    conv.weight.copy_(torch.eye(8)[:, :, None, None] * 4)
    assert conv.bias is not None
    conv.bias.zero_()
    x = (
        torch.linspace(-3, 3, 8 * 16)
        .view(1, 8, 4, 4)
        .bfloat16()
        .contiguous(memory_format=torch.channels_last)
    )
    assert torch.allclose(FusedConv2d(conv, "relu6")(x), (4 * x).clamp(0, 6))
    assert torch.allclose(FusedConv2d(conv)(x, x), 5 * x, rtol=0.01)
    assert torch.equal(FusedConv2d(conv)(x), 4 * x)


@needs_bfloat16
def test_weights_are_ordered_once_for_a_size_and_never_for_too_many() -> None:
    conv = channels_last(nn.Conv2d(8, 8, 3, padding=1))
    own = FusedConv2d(conv)

    def run(side: int) -> None:
        own(torch.zeros(1, 8, side, side, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last))

    run(8)
    first = next(iter(own._packed.values()))
    run(9)
    run(8)
    assert next(iter(own._packed.values())) is first
    for side in range(8, 40):
        run(side)
        assert 1 <= len(own._packed) <= 8
    with pytest.raises(NotImplementedError, match="copy of the network"):
        copy.deepcopy(own)


SIZES = ((2, 3), (4, 4), (8, 8), (8, 10), (9, 9), (6, 14), (40, 9), (1, 1), (32, 32), (64, 96))
# Of these oneDNN prefers several layouts: the first with AVX-512, all with AVX2.
CONVS = ((16, 96, 3), (672, 112, 1), (112, 672, 1))


def convolution(channels: int, out_channels: int, kernel: int) -> nn.Conv2d:
    torch.manual_seed(0)
    conv: Any = nn.Conv2d(channels, out_channels, kernel, padding=kernel // 2).requires_grad_(False)
    made: nn.Conv2d = conv.to(memory_format=torch.channels_last)
    return made


def unpacked(conv: nn.Conv2d, x: torch.Tensor, add: torch.Tensor | None = None) -> torch.Tensor:
    """The same operators on weights in their own order."""
    convolve = torch.ops.mkldnn._convolution_pointwise
    geometry = conv.padding, conv.stride, conv.dilation, 1
    found: torch.Tensor
    if add is None:
        found = convolve(x, conv.weight, conv.bias, *geometry, "none", [], None)
    else:
        found = convolve.binary(x, add, conv.weight, conv.bias, *geometry, "add", 1.0, None, [], None)
    return found


def inputs(channels: int) -> list[torch.Tensor]:
    return [torch.randn(1, channels, *s).contiguous(memory_format=torch.channels_last) for s in SIZES]


@needs_float32
@pytest.mark.parametrize("shape", CONVS)
def test_in_float32_the_weights_are_kept_in_onednns_layouts_only(shape: tuple[int, int, int]) -> None:
    conv = convolution(*shape)
    own = FusedConv2d(conv)
    for x in 2 * inputs(shape[0]):
        plain = unpacked(conv, x)
        assert torch.equal(own(x), plain)
        assert torch.equal(own(x, plain), unpacked(conv, x, plain))
    held = [*own.parameters(), *own.buffers(), *own._packed.values(), *own._layouts.values()]
    kept = {id(w): w for w in held if w.ndim == 4}
    assert {w.layout for w in kept.values()} == {torch._mkldnn}  # type: ignore[attr-defined]
    assert len(kept) == len(own._layouts) <= 3
    assert len(own._packed) == len(SIZES)


@needs_float32
@pytest.mark.parametrize("shape", CONVS)
def test_float32_weights_are_not_reordered_on_each_call(
    shape: tuple[int, int, int], capfd: pytest.CaptureFixture[str]
) -> None:
    own, images = FusedConv2d(convolution(*shape)), inputs(shape[0])
    first = [own(x) for x in images]
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        again = [own(x) for x in images]
    said = [line for line in capfd.readouterr().out.splitlines() if ",exec," in line]
    assert len([line for line in said if ",convolution," in line]) == len(SIZES)
    assert [line for line in said if ",reorder," in line] == []
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


@needs_float32
def test_layouts_and_known_sizes_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_MOST_KNOWN_SIZES", 5)
    conv = convolution(*CONVS[0])
    own = FusedConv2d(conv)
    # As if each size had a layout of its own.
    monkeypatch.setattr(fused, "_layout_of", lambda _: bytes(torch.randint(256, (8,)).tolist()))
    for x in inputs(16):
        assert torch.equal(own(x), unpacked(conv, x))
        assert 1 <= len(own._packed) <= 5
    assert len(own._layouts) == 4


@needs_float32
def test_without_a_description_of_layouts_the_first_one_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: torch.Tensor) -> torch.Tensor:
        raise AttributeError("no such operator")

    monkeypatch.setattr(torch.ops.mkldnn, "_get_mkldnn_serialized_md", missing)
    conv = convolution(*CONVS[0])
    own = FusedConv2d(conv)
    for x in inputs(16):
        assert torch.equal(own(x), unpacked(conv, x))
    assert {id(weight) for weight in own._packed.values()} == {id(own.weight)}


def lite() -> XMem:
    torch.manual_seed(0)
    return XMem(ModelConfig.lite())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_float32_and_bfloat16_on_a_cpu_are_fused(dtype: torch.dtype) -> None:
    model = lite()
    segmenter = VideoSegmenter(model, MemoryConfig(), size=64, dtype=dtype)
    fused_one = dtype in DTYPES and can_fuse(dtype)
    assert type(segmenter._network.key_encoder) is (FusedTrunk if fused_one else EfficientNetLite0Trunk)
    assert isinstance(model.key_encoder, EfficientNetLite0Trunk)  # the model that was given stays what it is


def prepared(config: ModelConfig, dtype: torch.dtype) -> XMem:
    """A network as `VideoSegmenter` prepares it before it is fused."""
    network = small_model(config).requires_grad_(False)
    fold_batch_norms(network)
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    network.split_shared()
    return network.to(dtype)


@pytest.mark.parametrize("backbone", ["resnet50", "efficientnet-lite0"])
@pytest.mark.parametrize("dtype", EACH)
def test_the_whole_network_computes_the_same(dtype: torch.dtype, backbone: Any) -> None:
    """Key encoder, value encoder and decoder, in float32 up to rounding, in bfloat16 about as far from it."""
    config = replace(SMALL, key_backbone=backbone)
    exact, plain, fast = (prepared(config, d) for d in (torch.float32, dtype, dtype))
    fuse(fast)
    assert not any(isinstance(m, ResidualBlock | BasicBlock | Bottleneck) for m in fast.modules())
    torch.manual_seed(1)
    image = torch.randn(1, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    readout, hidden = torch.randn(1, 2, SMALL.value_dim, 4, 6), torch.randn(1, 2, SMALL.hidden_dim, 4, 6)
    masks = torch.rand(1, 2, 64, 96)

    def outputs(network: XMem) -> list[torch.Tensor]:
        bfloat16 = network is not exact and dtype == torch.bfloat16
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            keys = network.encode_key(image)
            renewed, logits = network.decode(keys.scales, readout, hidden)
            value, deep = network.encode_value(image, keys.f16, hidden, masks)
        assert renewed is not None
        assert deep is not None
        return [t.float() for t in (keys.key, keys.f4, renewed, logits, value, deep)]

    for true, rounded, own in zip(*(outputs(network) for network in (exact, plain, fast)), strict=True):
        assert own.shape == true.shape
        if dtype == torch.float32:
            assert (own - true).abs().max() < 1e-4 * true.abs().max()
        else:
            assert (own - true).abs().mean() < 1.5 * (rounded - true).abs().mean() + 1e-6


@pytest.mark.parametrize("objects", [1, 3])
@pytest.mark.parametrize("dtype", EACH)
def test_the_decoder_stays_in_one_layout(
    dtype: torch.dtype, objects: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch recognises the layout of a single object's maps; else every operation would convert them."""
    network = prepared(SMALL, dtype)
    fuse(network)
    given: list[torch.Tensor] = []

    def seen(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def inner(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            out = function(x, *args, **kwargs)
            given.extend(t for t in (x, out) if t.shape[1] > 1)
            return out

        return inner

    for name in ("interpolate", "avg_pool2d"):
        monkeypatch.setattr(F, name, seen(getattr(F, name)))
    image = torch.randn(1, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    readout = torch.randn(1, objects, SMALL.value_dim, 4, 6)
    hidden = torch.randn(1, objects, SMALL.hidden_dim, 4, 6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        network.decode(network.encode_key(image).scales, readout, hidden)
    assert len(given) == 8 * objects  # two that upsample and two that pool
    for x in given:
        _, channels, height, width = x.shape
        assert x.stride() == (channels * height * width, 1, width * channels, channels)


@pytest.mark.parametrize("fault", [AttributeError, RuntimeError, TypeError, None])
def test_without_the_operators_nothing_is_fused(
    fault: type[Exception] | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Another PyTorch may lack them, take other arguments, or compute something else."""

    def forward(self: FusedConv2d, x: torch.Tensor, add: torch.Tensor | None = None) -> torch.Tensor:
        if fault is not None:
            raise fault("no such operator")
        return torch.zeros_like(x)

    monkeypatch.setattr(FusedConv2d, "forward", forward)
    can_fuse.cache_clear()
    try:
        with caplog.at_level(logging.INFO, logger=fused.__name__):
            network = lite().eval()
            fuse(network)
        assert isinstance(network.key_encoder, EfficientNetLite0Trunk)
        assert ("no such operator" in caplog.text) == (fault is not None)
    finally:
        can_fuse.cache_clear()
