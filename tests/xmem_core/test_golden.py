"""The published model: results of the authors' implementation with the same weights, case by case."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
from golden.weights import fill
from numpy.typing import NDArray
from support.other_memory import with_memory
from support.threads import torch_threads

from xmem_core import MemoryConfig, ModelConfig, Prompt, TrackerState, VideoSegmenter, XMem
from xmem_core.memory import Memory

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.npz"))

# Where several objects saturate the model is chaotic: p is about 1 - 1e-7 there, and one fp32 step moves its
# logit by 0.4. So a single value says little, and CPUs differ there: the largest difference is 3.5e-3 with
# AVX-512, 1.4e-2 with AVX2. Each bound is four to six times what 1e-6 of relative noise on all weights does
# to `defaults`, the longest and most chaotic case (`golden/noise.py`; the largest of four seeds):
#                                            noise     bound   127 prototypes for 128
# mean of |difference|                       1.8e-6    1e-5    5.5e-5
# 99.99 % of |differences| are below         8.7e-4    3.5e-3  3.0e-2
# share of labels that differ                1.2e-4    5e-4    1.5e-3
# largest |difference|                       1.9e-2    1e-1    1.7e-1
MEAN, HIGH_QUANTILE, LABELS, LARGEST = 1e-5, 3.5e-3, 5e-4, 1e-1
HIGH = 0.9999
# Measured: 1.5e-5 and 3e-4.
MAX_USAGE, MAX_SENSORY = 1e-4, 1e-3


@dataclass
class Run:
    """Results of our implementation for a case, beside the arrays to compare with."""

    golden: dict[str, NDArray[np.generic]]
    labels: NDArray[np.int32]
    probabilities: list[NDArray[np.float32]]
    sizes: list[tuple[int, int]]
    state: TrackerState
    before_prototypes: bytes
    """The state before the first frame whose step makes prototypes, if one does."""


@pytest.fixture(scope="module")
def two_threads() -> Iterator[None]:
    with torch_threads(2):
        yield


@pytest.fixture(scope="module")
def segmenters(two_threads: None) -> dict[int, VideoSegmenter]:
    """The published network with and without sensory memory, by hidden_dim."""
    built = {dim: XMem(ModelConfig(hidden_dim=dim)).eval() for dim in (64, 0)}
    for model in built.values():
        model.load_state_dict(fill(model.state_dict()))
    return {dim: VideoSegmenter(model, keep_model=False) for dim, model in built.items()}


@pytest.fixture(scope="module", params=CASES)
def run(request: pytest.FixtureRequest, segmenters: dict[int, VideoSegmenter]) -> Run:
    return follow(request.param, segmenters)


def follow(case: str, segmenters: dict[int, VideoSegmenter], begun: Run | None = None, **changes: int) -> Run:
    """Run a case, with memory settings changed by `changes`.

    Args:
        segmenters: by hidden_dim, with any memory settings.
        begun: the same case's run, of which to take everything before the first prototypes.
    """
    with np.load(GOLDEN / f"{case}.npz", allow_pickle=False) as file:
        golden = {name: file[name] for name in file.files}
    options = json.loads(str(golden["config"]))
    ours = {f.name for f in fields(MemoryConfig)}
    config = MemoryConfig(**{name: value for name, value in options.items() if name in ours} | changes)
    segmenter = with_memory(segmenters[options["hidden_dim"]], config)
    given_t, prob_t = golden["given_t"].tolist(), golden["prob_t"].tolist()
    prototypes_t = int((golden["sizes"][:, 1] > 0).argmax())
    if begun is None:
        first, before, state = 0, b"", segmenter.new_state()
        labels, probabilities, sizes = [], [], []
    else:
        first, before = prototypes_t, begun.before_prototypes
        state = TrackerState.from_bytes(before)
        assert state.memory is not None
        state.memory_config = state.memory.config = segmenter.memory_config
        labels, sizes = list(begun.labels[:first]), begun.sizes[:first]
        probabilities = begun.probabilities[: sum(t < first for t in prob_t)]
    for t, frame in enumerate(golden["frames"][first:], first):
        if t == prototypes_t > 0:
            before = state.to_bytes()
        prompt = None
        if t in given_t:
            mask = golden[f"given_mask_{t}"]
            prompt = Prompt({int(i): mask == i for i in golden[f"given_labels_{t}"]})
        result = segmenter.step(state, frame, prompt)
        labels.append(result.label_map.numpy())
        if t in prob_t:
            probabilities.append(result.probabilities.numpy())
        assert state.memory is not None
        sizes.append(state.memory.sizes)
    return Run(golden, np.stack(labels), probabilities, sizes, state, before)


def test_there_are_seven_cases() -> None:
    assert len(CASES) == 7


def test_sizes_are_equal(run: Run) -> None:
    assert run.sizes == [tuple(pair) for pair in run.golden["sizes"].tolist()]


@dataclass
class Distance:
    """Differences of a run from its golden."""

    mean: float
    high_quantile: float
    labels: float
    largest: float


def distance(run: Run) -> Distance:
    differences = []
    for ours, golden in zip(run.probabilities, run.golden["prob"], strict=True):
        existing = golden[golden[:, 0, 0] >= 0]
        assert ours.shape == existing.shape
        differences.append(np.abs(ours - existing).ravel())
    everywhere = np.concatenate(differences)
    labels = float((run.labels != run.golden["labels"]).mean())
    quantile = float(np.quantile(everywhere, HIGH))
    return Distance(float(everywhere.mean()), quantile, labels, float(everywhere.max()))


def test_probabilities_are_close(run: Run) -> None:
    found = distance(run)
    assert found.mean <= MEAN
    assert found.high_quantile <= HIGH_QUANTILE
    assert found.largest <= LARGEST


def test_labels_are_equal_but_for_a_few_pixels(run: Run) -> None:
    assert distance(run).labels <= LABELS


@pytest.mark.parametrize("run", ["defaults"], indirect=True)
def test_a_prototype_fewer_breaks_every_bound(run: Run, segmenters: dict[int, VideoSegmenter]) -> None:
    found = distance(follow("defaults", segmenters, run, num_prototypes=127))
    assert found.mean > MEAN
    assert found.high_quantile > HIGH_QUANTILE
    assert found.labels > LABELS
    assert found.largest > LARGEST


def test_usage_is_close(run: Run) -> None:
    memory = run.state.memory
    assert isinstance(memory, Memory)
    for name, region in (("work_usage", "working"), ("long_usage", "long_term")):
        if name not in run.golden:  # `no_long_term` counted none
            assert not memory.config.enable_long_term
            continue
        ours, golden = memory.usage(region).numpy(), run.golden[name]
        assert ours.shape == golden.shape
        assert np.abs(ours - golden).max() <= MAX_USAGE


def test_sensory_memory_is_close(run: Run) -> None:
    golden = run.golden["sensory"]
    if golden.size == 0:  # `no_sensory`
        assert run.state.hidden is None
        return
    assert run.state.hidden is not None
    assert run.state.hidden.shape == golden[0].shape
    assert np.abs(run.state.hidden.numpy() - golden[0]).max() <= MAX_SENSORY
