from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.small_net import SMALL, small_model
from torch import Tensor, nn

from xmem_core.backbones import EfficientNetLite0Trunk, fold_batch_norms
from xmem_core.blocks import (
    CBAM,
    FeatureFusion,
    GatedUpdate,
    ResidualBlock,
    SensoryUpdate,
    SplitConv2d,
    conv_shared,
    gated_update,
)
from xmem_core.network import XMem, aggregate


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def repeated(shared: Tensor, own: Tensor) -> Tensor:
    """cat(shared, own) for every object: (B*O, C_s + C_o, h, w)."""
    b, o = own.shape[:2]
    return torch.cat([shared.unsqueeze(1).expand(b, o, -1, -1, -1), own], 2).flatten(0, 1)


def assert_same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


# --- aggregation -----------------------------------------------------------------------------------------


def test_aggregation_of_one_object_is_its_probability() -> None:
    p = torch.tensor([0.1, 0.5, 0.9]).view(1, 1, 1, 3)
    joint = torch.softmax(aggregate(p), 1)[0, :, 0]
    # p / (1 - p) against (1 - p) / p
    expected = p.flatten() ** 2 / (p.flatten() ** 2 + (1 - p.flatten()) ** 2)
    assert_same(joint[1], expected)
    assert_same(joint.sum(0), torch.ones(3))


def test_aggregation_by_hand_for_two_objects() -> None:
    p = torch.tensor([0.8, 0.4]).view(1, 2, 1, 1)
    odds = torch.tensor([0.12 / 0.88, 0.8 / 0.2, 0.4 / 0.6])
    assert_same(torch.softmax(aggregate(p), 1).flatten(), odds / odds.sum())


def test_aggregation_is_finite_at_0_and_1() -> None:
    p = torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 0.0]]).view(1, 2, 1, 3)
    logits = aggregate(p)
    assert torch.isfinite(logits).all()
    joint = torch.softmax(logits, 1)[0, :, 0]
    assert joint[0, 0] > 1 - 1e-5
    assert_same(joint[1:, 1], torch.tensor([0.5, 0.5]))
    assert joint[1, 2] > 1 - 1e-5


# --- blocks ----------------------------------------------------------------------------------------------


def test_a_shared_convolution_is_the_convolution_of_the_concatenation() -> None:
    conv = nn.Conv2d(7, 5, 3, stride=2, padding=1)
    shared, own = seeded(2, 4, 9, 8), seeded(2, 3, 3, 9, 8, seed=1)
    with torch.no_grad():
        assert_same(conv_shared(conv, shared, own).flatten(0, 1), conv(repeated(shared, own)))
        assert_same(conv_shared(SplitConv2d(conv, 4), shared, own).flatten(0, 1), conv(repeated(shared, own)))


def test_a_split_convolution_keeps_the_layout_and_leaves_the_whole_one_alone() -> None:
    conv = nn.Conv2d(7, 5, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    split = SplitConv2d(conv, 4)
    assert conv.weight.shape[1] == conv.in_channels == 7
    for part, channels in ((split.shared, 4), (split.own, 3)):
        assert part.weight.shape == (5, channels, 3, 3)
        assert part.in_channels == channels
        assert part.weight.is_contiguous(memory_format=torch.channels_last)
    assert split.own.bias is None
    assert split.shared.bias is not None
    assert torch.equal(split.shared.bias, conv.bias)


@pytest.mark.parametrize("out_dim", [7, 6])  # with and without `downsample`
def test_a_residual_block_treats_shared_channels_as_concatenated(out_dim: int) -> None:
    block = ResidualBlock(7, out_dim)
    assert (block.downsample is None) == (out_dim == 7)
    shared, own = seeded(2, 4, 6, 5), seeded(2, 3, 3, 6, 5, seed=1)
    with torch.no_grad():
        assert_same(block.forward_shared(shared, own), block(repeated(shared, own)))


def test_cbam_gates_channels_then_positions() -> None:
    cbam = CBAM(32)
    x = seeded(2, 32, 6, 5)
    with torch.no_grad():
        mlp = cbam.ChannelGate.mlp
        by_channel = torch.sigmoid(mlp(x.flatten(2).mean(2)) + mlp(x.flatten(2).amax(2)))
        gated = x * by_channel[:, :, None, None]
        maps = torch.stack([gated.amax(1), gated.mean(1)], 1)
        by_position = torch.sigmoid(cbam.SpatialGate.spatial["conv"](maps))
        assert_same(cbam(x), gated * by_position)


def test_fusion_adds_the_attention_to_what_it_attends() -> None:
    fusion = FeatureFusion(8, 8, 16)
    shared, own = seeded(1, 8, 4, 4), seeded(1, 2, 8, 4, 4, seed=1)
    with torch.no_grad():
        z = fusion.block1(repeated(shared, own))
        expected = fusion.block2(z + fusion.attention(z))
        assert_same(fusion(shared, own)[0], expected)


def test_the_gated_update_is_the_published_one() -> None:
    transform = nn.Conv2d(5, 6, 3, padding=1)
    x, h = seeded(1, 2, 3, 4, 4), seeded(1, 2, 2, 4, 4, seed=1)
    with torch.no_grad():
        for o in range(2):
            forget, update, new = transform(torch.cat([x[:, o], h[:, o]], 1)).split(2, 1)
            f, u = torch.sigmoid(forget), torch.sigmoid(update)
            expected = f * h[:, o] * (1 - u) + u * torch.tanh(new)
            assert_same(gated_update(transform, x, h)[:, o], expected)


def test_the_sensory_update_sums_three_scales() -> None:
    update = SensoryUpdate((6, 5, 4), 7, 3)
    g16, g8, g4 = seeded(2, 6, 3, 3), seeded(2, 5, 6, 6, seed=1), seeded(2, 5, 12, 12, seed=2)
    h = seeded(1, 2, 3, 3, 3, seed=3)
    with torch.no_grad():
        x = update.g16_conv(g16)
        x = x + update.g8_conv(nn.functional.interpolate(g8, scale_factor=0.5, mode="area"))
        x = x + update.g4_conv(nn.functional.interpolate(g4, scale_factor=0.25, mode="area"))
        own = update(update.summed(g16, g8, g4[:, :4], g4[:, 4:]), h)
        assert_same(own, gated_update(update.transform, x.unsqueeze(0), h))


# --- the network -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> XMem:
    return small_model().requires_grad_(False)


@pytest.mark.parametrize("size", [(32, 48), (16, 16)])
def test_shapes_at_every_boundary(model: XMem, size: tuple[int, int]) -> None:
    image = seeded(2, 3, *size)
    h, w = size[0] // 16, size[1] // 16
    keys = model.encode_key(image)
    assert keys.key.shape == keys.selection.shape == (2, SMALL.key_dim, h, w)
    assert keys.shrinkage.shape == (2, 1, h, w)
    assert [f.shape[2:] for f in keys.scales] == [(h, w), (2 * h, 2 * w), (4 * h, 4 * w)]
    hidden = torch.zeros(2, 3, SMALL.hidden_dim, h, w)
    value, renewed = model.encode_value(image, keys.f16, hidden, torch.rand(2, 3, *size))
    assert value.shape == (2, 3, SMALL.value_dim, h, w)
    assert renewed is not None
    after, logits = model.decode(keys.scales, value, renewed)
    assert after is not None
    assert after.shape == hidden.shape
    assert logits.shape == (2, 3, *size)


def test_shrinkage_and_selection_are_in_their_ranges(model: XMem) -> None:
    keys = model.encode_key(10 * seeded(1, 3, 64, 64))
    assert keys.shrinkage.min() >= 1
    assert keys.shrinkage.max() > 1
    assert 0 <= keys.selection.min() < keys.selection.max() <= 1


def test_an_image_of_a_batch_is_encoded_as_if_alone(model: XMem) -> None:
    images = seeded(3, 3, 32, 48)
    together = model.encode_key(images)
    for row in range(3):
        assert_same(together.at(row).key, model.encode_key(images[row : row + 1]).key)


def test_the_value_encoder_sees_the_sum_of_the_other_masks(model: XMem) -> None:
    image = seeded(1, 3, 32, 32)
    f16 = model.encode_key(image).f16
    masks = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    hidden = torch.zeros(1, 3, SMALL.hidden_dim, 2, 2)
    seen = []
    hook = model.value_encoder.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    model.encode_value(image, f16, hidden, masks)
    hook.remove()
    assert_same(seen[0][:, :, 0], masks)
    for o in range(3):
        others = masks[:, [k for k in range(3) if k != o]].sum(1)
        assert_same(seen[0][:, o, 1], others)


def test_an_objects_value_and_logits_do_not_depend_on_its_place(model: XMem) -> None:
    image = seeded(1, 3, 32, 32)
    keys = model.encode_key(image)
    masks, hidden = torch.rand(1, 3, 32, 32), seeded(1, 3, SMALL.hidden_dim, 2, 2)
    order = [2, 0, 1]
    value, renewed = model.encode_value(image, keys.f16, hidden, masks)
    value_moved, renewed_moved = model.encode_value(image, keys.f16, hidden[:, order], masks[:, order])
    assert renewed is not None
    assert renewed_moved is not None
    assert_same(value_moved, value[:, order])
    assert_same(renewed_moved, renewed[:, order])
    logits, moved = (
        model.decode(keys.scales, v, h)[1] for v, h in ((value, renewed), (value_moved, renewed_moved))
    )
    assert_same(moved, logits[:, order])


def test_the_sensory_memory_changes_only_when_asked(model: XMem) -> None:
    image = seeded(1, 3, 32, 32)
    keys = model.encode_key(image)
    hidden = seeded(1, 1, SMALL.hidden_dim, 2, 2)
    mask = torch.ones(1, 1, 32, 32)
    value, same = model.encode_value(image, keys.f16, hidden, mask, deep_update=False)
    assert same is hidden
    _, renewed = model.encode_value(image, keys.f16, hidden, mask, deep_update=True)
    assert renewed is not None
    assert not torch.equal(renewed, hidden)
    kept, logits = model.decode(keys.scales, value, hidden, update_hidden=False)
    assert kept is hidden
    updated, logits_again = model.decode(keys.scales, value, hidden)
    assert updated is not None
    assert not torch.equal(updated, hidden)
    assert torch.equal(logits, logits_again)


def test_without_sensory_memory_there_is_none() -> None:
    model = small_model(replace(SMALL, hidden_dim=0)).requires_grad_(False)
    assert not any("hidden" in name for name in model.state_dict())
    keys = model.encode_key(seeded(1, 3, 32, 32))
    value, hidden = model.encode_value(seeded(1, 3, 32, 32), keys.f16, None, torch.ones(1, 1, 32, 32))
    assert hidden is None
    hidden, logits = model.decode(keys.scales, value, None)
    assert hidden is None
    assert logits.shape == (1, 1, 32, 32)


@pytest.mark.parametrize("backbone", ["resnet50", "efficientnet-lite0"])
def test_folded_batch_norms_compute_the_same(backbone: str) -> None:
    plain = small_model(replace(SMALL, key_backbone=backbone)).requires_grad_(False)
    folded = fold_batch_norms(small_model(replace(SMALL, key_backbone=backbone))).requires_grad_(False)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    image = seeded(1, 3, 32, 32)
    for a, b in zip(plain.encode_key(image).scales, folded.encode_key(image).scales, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(a.abs().max()))


def imagenet_checkpoint(trunk: EfficientNetLite0Trunk) -> dict[str, Tensor]:
    """The trunk's tensors under the classifier's names (`_blocks.3._bn1.weight`), with a head."""
    state = {"_fc.weight": torch.zeros(1000, 1280)}
    for name, tensor in trunk.state_dict().items():
        *modules, last = name.split(".")
        state[".".join([p if p.isdigit() else f"_{p}" for p in modules] + [last])] = tensor.clone()
    return state


def test_imagenet_weights_are_moved_to_our_normalisation(tmp_path: Path) -> None:
    source = small_model()
    assert isinstance(source.key_encoder, EfficientNetLite0Trunk)
    path = tmp_path / "lite0.pth"
    torch.save(imagenet_checkpoint(source.key_encoder), path)
    model = small_model().requires_grad_(False)
    model.load_backbone(path)
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(5)) * 255
    mean = torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1) * 255
    std = torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1) * 255
    ours = model.encode_key((pixels - mean) / std).f4
    theirs = source.requires_grad_(False).encode_key((pixels - 127) / 128).f4
    # Apart from the border, where padding is 0 in either scale and so another colour.
    inner = (..., slice(3, -3), slice(3, -3))
    torch.testing.assert_close(ours[inner], theirs[inner], rtol=1e-3, atol=1e-3)


def test_a_foreign_backbone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"_conv_stem.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not an EfficientNet-Lite0 checkpoint: it lacks"):
        small_model().load_backbone(path)
    other = small_model(replace(SMALL, key_backbone="resnet50"))
    with pytest.raises(ValueError, match="key_backbone='resnet50' has no ImageNet start"):
        other.load_backbone(path)


def test_a_gated_update_from_one_input_keeps_its_shape() -> None:
    with torch.no_grad():
        out = GatedUpdate(4, 3)(seeded(1, 2, 4, 5, 5), torch.zeros(1, 2, 3, 5, 5))
    assert out.shape == (1, 2, 3, 5, 5)
    assert out.abs().max() < 1
