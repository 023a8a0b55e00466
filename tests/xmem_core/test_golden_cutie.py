"""The published Cutie, case by case: what the authors' implementation computed, from the same weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden.cutie.weights import fill
from numpy.typing import NDArray
from support.other_memory import with_memory
from support.threads import torch_threads

from xmem_core import Cutie, CutieConfig, MemoryConfig, Prompt, TrackerState, VideoSegmenter
from xmem_core.grouped_memory import GroupedMemory

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parents[1] / "golden" / "cutie"
CASES = sorted(path.stem for path in GOLDEN.glob("*.npz"))

# The bounds of golden/cutie/README.md. Measured here: 9e-6, 5e-7, no label, 4e-6, 3e-6 and 8e-8.
LARGEST, MEAN, LABELS = 5e-4, 1e-5, 1e-4
SENSORY, USAGE, SUMMARY = 5e-4, 1e-2, 2e-5

_OURS = {
    "max_mem_frames": "max_mid_term_frames",
    "min_mem_frames": "min_mid_term_frames",
    "max_num_tokens": "max_long_term_elements",
    "use_long_term": "enable_long_term",
}
"""Published names of memory settings and ours, where these differ."""
_ALWAYS = {"model", "count_usage"}


@dataclass
class Run:
    """What our implementation made of a case, beside the arrays it has to equal."""

    golden: dict[str, NDArray[Any]]
    labels: NDArray[np.int32]
    probabilities: list[NDArray[np.float32]]
    sizes: list[list[tuple[int, int]]]
    state: TrackerState

    @property
    def memory(self) -> GroupedMemory:
        assert isinstance(self.state.memory, GroupedMemory)
        return self.state.memory


@pytest.fixture(scope="module")
def segmenters() -> Iterator[dict[str, VideoSegmenter]]:
    with torch_threads(2):
        built = {"base": Cutie(CutieConfig()).eval(), "small": Cutie(CutieConfig.small()).eval()}
        for model in built.values():
            model.load_state_dict(fill(model.state_dict()))
        yield {name: VideoSegmenter(model, keep_model=False) for name, model in built.items()}


@pytest.fixture(scope="module", params=CASES)
def run(request: pytest.FixtureRequest, segmenters: dict[str, VideoSegmenter]) -> Run:
    return follow(request.param, segmenters)


def follow(case: str, segmenters: dict[str, VideoSegmenter], **changes: int) -> Run:
    """Run a case, with other memory settings than its own where `changes` says so."""
    with np.load(GOLDEN / f"{case}.npz", allow_pickle=False) as file:
        golden = {name: file[name] for name in file.files}
    options = json.loads(str(golden["config"]))
    ours = {_OURS.get(n, n): v for n, v in options.items() if n not in _ALWAYS} | changes
    # Without long-term memory the lower limit has no meaning, but has to be under the upper one.
    ours.setdefault("min_mid_term_frames", 1)
    segmenter = with_memory(segmenters[options["model"]], MemoryConfig(**ours))
    state = segmenter.new_state()
    labels, probabilities, sizes = [], [], []
    given_t, prob_t = golden["given_t"].tolist(), golden["prob_t"].tolist()
    for t, frame in enumerate(golden["frames"]):
        prompt = None
        if t in given_t:
            mask = golden[f"given_mask_{t}"]
            prompt = Prompt({int(i): mask == i for i in golden[f"given_labels_{t}"]})
        result = segmenter.step(state, frame, prompt)
        labels.append(result.label_map.numpy())
        if t in prob_t:
            probabilities.append(result.probabilities.numpy())
        assert isinstance(state.memory, GroupedMemory)
        sizes.append([group.sizes for group in state.memory.groups.values()])
    return Run(golden, np.stack(labels), probabilities, sizes, state)


def largest_and_mean(run: Run) -> tuple[float, float]:
    differences = []
    for ours, golden in zip(run.probabilities, run.golden["prob"], strict=True):
        existing = golden[golden[:, 0, 0] >= 0]
        assert ours.shape == existing.shape
        differences.append(np.abs(ours - existing).ravel())
    everywhere = np.concatenate(differences)
    return float(everywhere.max()), float(everywhere.mean())


def test_there_are_four_cases() -> None:
    assert len(CASES) == 4


def test_sizes_are_equal(run: Run) -> None:
    for number, name in enumerate(("sizes", "sizes_late")):
        if name in run.golden:
            ours = [groups[number] if number < len(groups) else (0, 0) for groups in run.sizes]
            assert ours == [tuple(pair) for pair in run.golden[name].tolist()]
    assert len(run.memory.groups) == 1 + ("sizes_late" in run.golden)


def test_probabilities_are_close(run: Run) -> None:
    largest, mean = largest_and_mean(run)
    assert largest <= LARGEST
    assert mean <= MEAN


def test_labels_are_equal_but_for_a_few_pixels(run: Run) -> None:
    assert float((run.labels != run.golden["labels"]).mean()) <= LABELS


def test_usage_is_close(run: Run) -> None:
    groups = list(run.memory.groups.values())
    for number, suffix in enumerate(("", "_late")):
        if f"work_usage{suffix}" not in run.golden:  # no long-term memory, or one group
            continue
        group = groups[number]
        # The group's first frame is not counted in the published code.
        working = group.usage("working")[group.positions :].numpy()
        assert np.abs(working - run.golden[f"work_usage{suffix}"]).max() <= USAGE
        # An eviction sorts the published elements; ours stay in their order.
        long_term = np.sort(group.usage("long_term").numpy())
        assert np.abs(long_term - np.sort(run.golden[f"long_usage{suffix}"])).max() <= USAGE


def test_sensory_memory_is_close(run: Run) -> None:
    assert run.state.hidden is not None
    assert np.abs(run.state.hidden.numpy() - run.golden["sensory"][0]).max() <= SENSORY


def test_object_memory_is_close(run: Run) -> None:
    golden = run.golden["object_memory"][0]
    ours = np.stack([summary.numpy() for summary in run.memory.summaries.values()])
    assert np.abs(ours - golden).max() <= SUMMARY * np.abs(golden).max()


@pytest.mark.parametrize("changes", [{"top_k": 29}, {"num_prototypes": 15}, {"buffer_tokens": 0}], ids=str)
def test_a_setting_slightly_off_breaks_the_bounds(
    segmenters: dict[str, VideoSegmenter], changes: dict[str, int]
) -> None:
    largest, mean = largest_and_mean(follow("one_object_long_term", segmenters, **changes))
    assert largest > LARGEST
    assert mean > MEAN
