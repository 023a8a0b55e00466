"""Runs of labels that are found where the planes are: what they are, and that nothing waits for them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.small_net import SMALL_MEMORY, frame_at, small_model, square

from xmem_core import Prompt, StepResult, VideoSegmenter
from xmem_core.presence import FEATURES, PresenceConstants, presence_features, presence_scores
from xmem_core.runs import begin_runs


def scattered(height: int, width: int, labels: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, labels, (height, width), generator=generator, dtype=torch.int32)
    ids = ids * (torch.rand(height, width, generator=generator) < 0.7)
    return ids.to(torch.int32), 0.05 + 0.95 * torch.rand(height, width, generator=generator)


@pytest.mark.parametrize(
    ("height", "width", "labels"), [(7, 5, 3), (31, 64, 12), (1, 1, 2), (40, 3, 1), (2, 90, 2)]
)
@pytest.mark.parametrize("usual", [3, 8192])
def test_they_are_those_of_the_labels_in_column_order(
    height: int, width: int, labels: int, usual: int
) -> None:
    ids, probabilities = scattered(height, width, labels, height + width)
    found = begin_runs(ids, probabilities, None, usual)()
    down = ids.numpy().T.ravel()
    again = np.repeat(found.labels, found.ends - found.starts)
    assert np.array_equal(again, down)
    assert found.starts[0] == 0
    assert found.ends[-1] == height * width
    assert (found.labels[1:] != found.labels[:-1]).all()
    values = probabilities.numpy().T.ravel()
    for start, end, total in zip(found.starts, found.ends, found.sums, strict=True):
        assert total == values[start:end].astype(np.float64).sum()  # exactly
    assert found.presence is None


def test_presence_comes_with_them() -> None:
    ids, probabilities = scattered(9, 8, 3, 1)
    presence = torch.tensor([0.25, 1 / 3])
    for usual in (2, 8192):
        found = begin_runs(ids, probabilities, presence, usual)()
        assert found.presence is not None
        assert np.array_equal(found.presence, presence.numpy())


@pytest.mark.parametrize("size", [(48, 64), (61, 97)])
def test_nothing_waits_for_the_device(size: tuple[int, int]) -> None:
    """On the `meta` device, what would wait for a value raises an error, see `test_host_syncs`."""
    planes = torch.empty(4, 48, 64, device="meta")
    constants = PresenceConstants((1.0,) * len(FEATURES), -1.0)
    result = StepResult((1, 2, 9), size, planes, constants)
    assert result.finds_runs
    result.begin_runs()
    with pytest.raises((RuntimeError, TypeError)):
        result.runs  # noqa: B018  this waits


def test_on_a_cpu_there_are_none() -> None:
    tracker = VideoSegmenter(small_model(), SMALL_MEMORY)
    result = tracker.step(tracker.new_state(), frame_at(0), Prompt({1: square(48, 64, 4, 4, 20)}))
    assert not result.finds_runs
    result.begin_runs()
    assert result.runs is None
    same = StepResult(result.object_ids, result.frame_size, result.network_probabilities, finds_runs=True)
    assert same.runs is not None


@pytest.mark.parametrize("objects", [1, 3])
def test_presence_of_whole_frames_is_that_of_their_part_with_objects(
    objects: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU all pixels are looked at, on a CPU only those where there may be objects."""
    generator = torch.Generator().manual_seed(objects)
    logits = torch.randn(objects + 1, 30, 40, generator=generator)
    logits[0, :, 20:] += 9  # background
    planes = torch.softmax(2 * logits, 0)
    constants = PresenceConstants((0.5, 1.0, -0.5, 2.0, 0.3, -1.0), 0.2)
    wanted = presence_scores(planes, constants)
    features = presence_features(planes)

    class OfGPU(torch.Tensor):
        """A tensor on a CPU that says that it is on a GPU."""

        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("cuda")

    monkeypatch.setattr("xmem_core.transfer.on_device", lambda tensor, device: tensor)
    torch.testing.assert_close(torch.Tensor(presence_features(planes.as_subclass(OfGPU))), features)
    torch.testing.assert_close(torch.Tensor(presence_scores(planes.as_subclass(OfGPU), constants)), wanted)
