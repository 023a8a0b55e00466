from __future__ import annotations

import math

import pytest
import torch

from xmem_core import StepResult
from xmem_core.presence import FEATURES, PresenceConstants, presence_features, presence_scores


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
    assert presence_scores(torch.ones(1, 3, 3)).shape == (0,)


def test_scores_are_the_logistic_of_the_weighted_features() -> None:
    constants = PresenceConstants((2.0, 0.0, 1.0, 0.0, -1.0, 0.0), -0.5)
    score, missing = presence_scores(PAIR, constants).tolist()
    total = 2 * 0.775 + 1.55 / 1.75 - (math.log10(0.5) + 2) - 0.5
    assert score == pytest.approx(1 / (1 + math.exp(-total)), abs=1e-6)
    assert missing == 0.0


def test_an_unknown_number_of_weights_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2 weights: need one for each of mean, peak"):
        PresenceConstants((1.0, 2.0), 0.0)


def test_a_sure_mask_scores_higher_than_a_doubtful_one() -> None:
    sure = planes([[0.97] * 8 + [0.02] * 8] * 8)
    doubtful = planes([[0.55] * 8 + [0.3] * 8] * 8)
    assert presence_scores(sure)[0] > presence_scores(doubtful)[0] + 0.2


def test_a_step_tells_the_presence_of_its_objects() -> None:
    result = StepResult((4, 9), (16, 64), torch.nn.functional.interpolate(PAIR[None], (8, 32))[0])
    assert torch.equal(result.presence, presence_scores(result.network_probabilities))
    assert result.presence.shape == (2,)
