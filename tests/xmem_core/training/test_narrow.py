"""Narrowing keeps the strongest channels, and their connections."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tiny import TINY
from torch import nn

from xmem_core.config import ModelConfig
from xmem_core.network import XMem
from xmem_core.training.keep import load_weights
from xmem_core.training.narrow import narrow
from xmem_core.weights import save_weights

NARROW = replace(TINY, value_stem=8, value_widths=(8, 12, 16), decoder_dims=(32, 16, 8))
WIDE = replace(TINY, value_stem=12, value_widths=(12, 20, 24), decoder_dims=(48, 24, 12))
UNEQUAL = replace(WIDE, value_stem=10), replace(NARROW, value_stem=6)

# What writes the channels that are added to each other, and how many of them a narrow network has.
WRITERS = [
    ("value_encoder", 8, "conv1 bn1 layer1.0.conv2 layer1.0.bn2"),
    ("value_encoder", 8, "layer1.0.conv1 layer1.0.bn1"),
    ("value_encoder", 12, "layer2.0.conv1 layer2.0.bn1"),
    ("value_encoder", 12, "layer2.0.conv2 layer2.0.bn2 layer2.0.downsample.0 layer2.0.downsample.1"),
    ("value_encoder", 16, "layer3.0.conv1 layer3.0.bn1"),
    ("value_encoder", 16, "layer3.0.conv2 layer3.0.bn2 layer3.0.downsample.0 layer3.0.downsample.1"),
    ("decoder", 32, "fuser.block1.conv2 fuser.block1.downsample fuser.block2.conv2 up_16_8.skip_conv"),
    ("decoder", 32, "fuser.block1.conv1"),
    ("decoder", 32, "fuser.block2.conv1"),
    ("decoder", 2, "fuser.attention.ChannelGate.mlp.1"),
    ("decoder", 16, "up_16_8.out_conv.conv2 up_16_8.out_conv.downsample up_8_4.skip_conv"),
    ("decoder", 16, "up_16_8.out_conv.conv1"),
    ("decoder", 8, "up_8_4.out_conv.conv2 up_8_4.out_conv.downsample"),
    ("decoder", 8, "up_8_4.out_conv.conv1"),
]


@torch.no_grad()
def with_dead_channels(wide: ModelConfig) -> XMem:
    """A wide network in which only as many channels are used as a narrow one has."""
    torch.manual_seed(3)
    model = XMem(wide).eval()
    # The gate over positions takes means over channels, which those that do nothing would change.
    gate = model.decoder.fuser.attention.SpatialGate.spatial["conv"]
    assert isinstance(gate, nn.Conv2d)
    gate.weight.zero_()
    for part, alive, names in WRITERS:
        layers = [model.get_submodule(f"{part}.{name}") for name in names.split()]
        weight = layers[0].get_parameter("weight")
        dead = torch.randperm(len(weight))[alive:]
        for layer in layers:
            for parameter in layer.parameters():
                parameter[dead] = 0
    return model


@torch.no_grad()
def test_channels_that_do_nothing_can_be_left_out() -> None:
    wide = with_dead_channels(WIDE)
    small = XMem(NARROW).eval()
    small.load_state_dict(narrow(wide.state_dict(), WIDE, NARROW))
    image, masks = torch.randn(1, 3, 64, 96), torch.rand(1, 2, 64, 96)
    hidden = torch.randn(1, 2, TINY.hidden_dim, 4, 6)
    readout = torch.randn(1, 2, TINY.value_dim, 4, 6)
    found = []
    for model in (wide, small):
        keys = model.encode_key(image)
        value, renewed = model.encode_value(image, keys.f16, hidden, masks)
        after, logits = model.decode(keys.scales, readout, hidden)
        found.append((keys.key, keys.shrinkage, keys.selection, value, renewed, after, logits))
    for one, other in zip(*found, strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_to_its_own_shape_nothing_changes() -> None:
    state = XMem(WIDE).state_dict()
    same = narrow(state, WIDE, WIDE)
    assert list(same) == list(state)
    assert all(torch.equal(same[name], tensor) for name, tensor in state.items())


def test_how_a_model_is_used_does_not_matter() -> None:
    state = XMem(WIDE).state_dict()
    used = replace(WIDE, default_size=64, default_search_window=96, presence=(1.0,) * 7)
    assert torch.equal(
        narrow(state, used, NARROW)["decoder.pred.weight"], narrow(state, WIDE, NARROW)["decoder.pred.weight"]
    )


def test_a_stem_of_its_own_width() -> None:
    wide, config = UNEQUAL
    XMem(config).load_state_dict(narrow(XMem(wide).state_dict(), wide, config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(NARROW, key_dim=TINY.key_dim // 2), "another key_dim cannot be narrowed"),
        (replace(NARROW, decoder_dims=(64, 16, 8)), r"more channels \(d16, f1, f2, gate\)"),
        (replace(NARROW, value_stem=6), "in only one of them"),
    ],
)
def test_other_shapes_are_refused(config: ModelConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        narrow(XMem(WIDE).state_dict(), WIDE, config)


def test_a_run_starts_from_wider_weights(tmp_path: Path) -> None:
    wide = XMem(WIDE)
    save_weights(wide, tmp_path / "wide.safetensors")
    small = XMem(NARROW)
    load_weights(small, tmp_path / "wide.safetensors")
    for name, tensor in narrow(wide.state_dict(), WIDE, NARROW).items():
        torch.testing.assert_close(small.state_dict()[name], tensor, atol=1e-2, rtol=1e-2)
