from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny import tiny_model

from xmem_core import ModelConfig, Prompt, StepResult, VideoSegmenter, XMem, load_model
from xmem_core.presence import FEATURES, PresenceConstants, presence_features, presence_scores
from xmem_core.weights import save_weights


def planes(*objects: list[list[float]]) -> torch.Tensor:
    """(O + 1, h, w) of given object probabilities; the background has the rest."""
    given = torch.tensor(objects)
    return torch.cat([1 - given.sum(0, keepdim=True), given])


PAIR = planes([[0.6, 0.95, 0.2, 0.0]], [[0.3, 0.05, 0.0, 0.4]])


def test_features_by_hand() -> None:
    first, second = presence_features(PAIR).tolist()
    assert dict(zip(FEATURES, first, strict=True)) == pytest.approx(
        {
            "mean": 0.775,
            "peak": 0.95,
            "solid": 1.55 / 1.75,
            "sure": 0.5,
            "size": math.log10(0.5) + 2,
            "rival": 0.175,
        }
    )
    assert second == [0.0] * len(FEATURES)  # nowhere the most probable


def test_one_object_and_none() -> None:
    alone = presence_features(planes([[0.9, 0.1]]))
    assert alone[0, -1] == 0
    assert presence_features(torch.ones(1, 3, 3)).shape == (0, len(FEATURES))
    assert presence_scores(torch.ones(1, 3, 3), PresenceConstants((1.0,) * 6, 0.0)).shape == (0,)


def test_scores_are_the_logistic_of_the_weighted_features() -> None:
    constants = PresenceConstants((2.0, 0.0, 1.0, 0.0, -1.0, 0.0), -0.5)
    score, missing = presence_scores(PAIR, constants).tolist()
    total = 2 * 0.775 + 1.55 / 1.75 - (math.log10(0.5) + 2) - 0.5
    assert score == pytest.approx(1 / (1 + math.exp(-total)), abs=1e-6)
    assert missing == 0.0


def test_an_unknown_number_of_weights_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2 weights: need one for each of mean, peak"):
        PresenceConstants((1.0, 2.0), 0.0)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_features_are_those_counted_pixel_by_pixel(count: int) -> None:
    drawn = torch.softmax(3 * torch.randn(count + 1, 6, 9, generator=torch.Generator().manual_seed(count)), 0)
    drawn[0], drawn[1] = 0.0, drawn[1] + drawn[0] * (drawn[1] > 0.2)  # the first is somewhere
    found = presence_features(drawn)
    for k in range(1, count + 1):
        pixels = [drawn[:, y, x] for y in range(6) for x in range(9)]
        inside = [p for p in pixels if int(p.argmax()) == k]
        if not inside:
            assert found[k - 1].tolist() == [0.0] * len(FEATURES)
            continue
        own = [float(p[k]) for p in inside]
        rivals = [max((float(v) for i, v in enumerate(p) if i not in (0, k)), default=0.0) for p in inside]
        expected = {
            "mean": sum(own) / len(own),
            "peak": max(own),
            "solid": sum(own) / sum(float(p[k]) for p in pixels),
            "sure": sum(v > 0.9 for v in own) / len(own),
            "size": math.log10(len(own) / 54) + 2,
            "rival": sum(rivals) / len(own),
        }
        assert dict(zip(FEATURES, found[k - 1].tolist(), strict=True)) == pytest.approx(expected, abs=1e-5)
    assert torch.equal(presence_features(drawn, ("size", "mean")), found[:, [4, 0]])


def test_a_sure_mask_scores_higher_than_a_doubtful_one() -> None:
    constants = fitted()
    sure = planes([[0.97] * 8 + [0.02] * 8] * 8)
    doubtful = planes([[0.55] * 8 + [0.3] * 8] * 8)
    assert presence_scores(sure, constants)[0] > presence_scores(doubtful, constants)[0] + 0.2


def fitted() -> PresenceConstants:
    """The constants of the bundled weights."""
    numbers = load_model("xmem-lite").config.presence
    assert numbers is not None
    return PresenceConstants.from_list(numbers)


def test_a_step_tells_the_presence_of_its_objects() -> None:
    probabilities = torch.nn.functional.interpolate(PAIR[None], (8, 32))[0]
    constants = PresenceConstants((2.0, 0.0, 1.0, 0.0, -1.0, 0.0), -0.5)
    result = StepResult((4, 9), (16, 64), probabilities, constants)
    assert result.presence is not None
    assert torch.equal(result.presence, presence_scores(probabilities, constants))
    assert result.presence.shape == (2,)
    assert StepResult((4, 9), (16, 64), probabilities).presence is None


def test_it_travels_with_the_weights(tmp_path: Path) -> None:
    numbers = (2.0, 0.0, 1.0, 0.0, -1.0, 0.0, -0.5)
    model = tiny_model()
    assert model.config.presence is None
    frame = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    mask = np.zeros((48, 64), bool)
    mask[8:40, 8:40] = True

    def presence(of: XMem) -> torch.Tensor | None:
        segmenter = VideoSegmenter(of)
        state = segmenter.new_state()
        segmenter.step(state, frame, Prompt({3: mask}))
        result = segmenter.step(state, frame)
        if result.presence is not None:
            constants = PresenceConstants.from_list(numbers)
            assert torch.equal(result.presence, presence_scores(result.network_probabilities, constants))
        return result.presence

    assert presence(model) is None
    model.config = replace(model.config, presence=numbers)
    save_weights(model, tmp_path / "fitted.safetensors")
    loaded = load_model(tmp_path / "fitted.safetensors")
    assert loaded.config.presence == numbers
    assert isinstance(loaded, XMem)
    assert presence(loaded) is not None
    # How sure a model may be is no part of what it is.
    assert loaded.config == tiny_model().config


@pytest.mark.parametrize("numbers", [(1.0,), (math.nan,) * 7, ("1",) * 7])
def test_other_numbers_than_weights_and_intercept_are_refused(numbers: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="a weight for each of mean, peak"):
        ModelConfig(presence=numbers)
