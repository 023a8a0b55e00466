"""The click network: its inputs, its file, its behaviour in inference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from xmem_core.clicks import ClickConfig, ClickNet, click_maps, load_click_model
from xmem_core.training.keep import publish_weights
from xmem_core.weight_files import BUNDLED_CLICKS, WeightsError

SMALL = ClickConfig(dims=(16, 8, 8, 8), click_dims=(4, 4, 8), heads=2, attention_blocks=1)


def test_maps_have_a_disc_and_a_wide_map_for_each_sign_and_the_mask_so_far() -> None:
    previous = torch.rand(2, 1, 32, 48)
    maps = click_maps([[(20, 10, True), (60, 40, False)], []], previous, ClickConfig(disc=5, spread=24))
    assert maps.shape == (2, 5, 32, 48)
    assert torch.equal(maps[:, 4:], previous)
    assert maps[0, :2, 5, 10].tolist() == [1, 0]
    assert maps[0, :2, 20, 30].tolist() == [0, 1]
    # Cells are two pixels wide, centred between them; 5 pixels are a disc of about 20 cells.
    assert 16 <= maps[0, 0].sum() <= 24
    assert maps[0, 2, 5, 10] > 0.99
    assert maps[0, 2, 5, 22] == pytest.approx(torch.exp(torch.tensor(-(24.5**2 + 0.25) / (2 * 24**2))).item())
    assert not maps[1, :4].any()


def test_logits_are_at_half_the_inputs_size() -> None:
    net = ClickNet(SMALL).eval()
    features = net.encode(torch.rand(1, 3, 64, 96))
    assert [f.shape[-2:] for f in features] == [(32, 48), (16, 24), (8, 12)]
    maps = click_maps([[(30, 30, True)]], torch.zeros(1, 1, 32, 48), SMALL)
    assert net(features, maps).shape == (1, 1, 32, 48)


def test_a_file_gives_the_network_that_was_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = ClickNet(SMALL).half().float().eval()  # files hold half precision
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn_like(module.running_mean).half() * 0.1)  # type: ignore[union-attr,arg-type]
    path = tmp_path / "clicks.safetensors"
    publish_weights(path, SMALL, net.state_dict())
    loaded = load_click_model(path)
    assert loaded.config == SMALL
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in loaded.modules())
    image, maps = torch.rand(1, 3, 64, 64), torch.rand(1, 5, 32, 32)
    with torch.inference_mode():
        expected, found = net(net.encode(image), maps), loaded(loaded.encode(image), maps)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_files_that_are_no_click_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no click model at"):
        load_click_model(tmp_path / "none.safetensors")
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="is no click model: 'config'"):
        load_click_model(path)
    save_file({"x": torch.zeros(1)}, path, {"config": "{}"})
    with pytest.raises(WeightsError, match="does not hold this network's weights"):
        load_click_model(path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dims": (8, 8)}, "dims"),
        ({"heads": 3}, "heads=3"),
        ({"size": 8}, "size"),
    ],
)
def test_settings_are_checked(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClickConfig.from_dict(wrong)
    with pytest.raises(ValueError, match="unknown setting depth"):
        ClickConfig.from_dict({"depth": 3})


def test_the_bundled_model_is_small() -> None:
    assert BUNDLED_CLICKS.stat().st_size < 5e6
    assert sum(p.numel() for p in load_click_model().parameters()) < 2e6
