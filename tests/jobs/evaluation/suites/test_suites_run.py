"""Suite runs: the report's figures for segmenters with known faults, and the command line."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from support.pictures import write_pictures
from support.threads import torch_threads
from support.tiny import tiny_model, tiny_weights

from jobs.cli.app import main
from jobs.evaluation.suites import fitting, runner
from jobs.evaluation.suites.fitting import fit_presence
from jobs.evaluation.suites.presence import reliability
from jobs.evaluation.suites.report import CROWD_GOALS, Goal
from jobs.evaluation.suites.runner import check_options, run_scene, run_suite
from jobs.evaluation.suites.stage import Scene
from pipeline.base.errors import UsageError
from xmem_core import MemoryConfig, VideoSegmenter, load_model
from xmem_core.fingerprint import model_fingerprint
from xmem_core.presence import FEATURES, presence_features
from xmem_core.weight_files import find_weights

HEIGHT = 48


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The tensors here are so small that more threads would only wait."""
    with torch_threads(1):
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), people=12, clips=0)


class Holds:
    """Keeps every mask where it was given."""

    def __init__(self) -> None:
        self.states: list[dict[int, np.ndarray]] = []

    def new_state(self) -> dict[int, np.ndarray]:
        self.states.append({})
        return self.states[-1]

    def step(self, state: dict[int, np.ndarray], frame: np.ndarray, prompt: Any = None) -> Any:
        assert state is self.states[-1]
        state.update({i: m.numpy() for i, m in (prompt.masks if prompt else {}).items()})
        labels = np.zeros(frame.shape[:2], np.int32)
        for identity, mask in state.items():
            labels[mask] = identity
        return SimpleNamespace(label_map=labels)


class Knows:
    """Returns the truth, with probabilities of 0.75 inside and 0.125 outside of masks."""

    def __init__(self, scene: Scene) -> None:
        self.scene, self.t = scene, -1

    def new_state(self) -> None:
        return None

    def step(self, state: None, frame: np.ndarray, prompt: Any = None) -> Any:
        self.t += 1
        assert (frame == self.scene.frames[self.t]).all()
        ids = tuple(i for i, first in self.scene.given.items() if first <= self.t)
        labels = np.where(np.isin(self.scene.truth[self.t], ids), self.scene.truth[self.t], 0)
        inside = torch.from_numpy(np.stack([labels == i for i in (0, *ids)]))
        return SimpleNamespace(
            label_map=torch.from_numpy(labels.astype(np.int32)),
            network_probabilities=torch.where(inside, 0.75, 0.125),
            object_ids=ids,
        )


def scene(root: Path) -> Scene:
    from jobs.evaluation.suites.crowd import crowd_scene
    from jobs.evaluation.suites.pictures import Pictures

    return crowd_scene(Pictures(root), 0, 1, HEIGHT)


def test_a_segmenter_that_knows_the_truth_is_perfect(root: Path) -> None:
    made = scene(root)
    measure, seen = run_scene(made, Knows(made))
    assert len(measure.objects) == len(made.given) >= 1
    for found in measure.objects:
        assert (found.j, found.leaked, found.swaps, found.lost, found.false) == (1.0, 0, 0, 0, 0)
        assert found.recoveries == found.returns
    assert sum(o.returns for o in measure.objects) >= 1
    assert seen is not None
    masks = sum(int((made.visible_of(i)[first + 1 :] > 0).sum()) for i, first in made.given.items())
    assert seen.features.shape == (masks, len(FEATURES))
    assert seen.features[:, 0] == pytest.approx(0.75)
    assert seen.right.all()


def test_masks_are_given_on_their_frames_and_those_of_distractors_never(root: Path) -> None:
    made = scene(root)
    prompts: dict[int, list[int]] = {}

    class Notes(Holds):
        t = -1

        def step(self, state: Any, frame: np.ndarray, prompt: Any = None) -> Any:
            self.t += 1
            for identity, mask in (prompt.masks if prompt else {}).items():
                assert (mask.numpy() == (made.truth[self.t] == identity)).all()
                prompts.setdefault(identity, []).append(self.t)
            return super().step(state, frame, prompt)

    _, seen = run_scene(made, Notes())
    assert seen is None
    assert prompts == {i: [first] for i, first in made.given.items()}


def test_a_report_of_a_segmenter_that_stands_still(root: Path) -> None:
    lines: list[str] = []
    shown: list[tuple[str, int]] = []
    segmenter = Holds()
    report = run_suite(
        "crowd",
        root,
        segmenter,
        scenes=2,
        seed=5,
        height=HEIGHT,
        progress=lines.append,
        on_frame=lambda s, t, labels: shown.append((s.name, t)),
    )
    assert len(segmenter.states) == 2
    assert [line.split()[:2] for line in lines] == [["1/2", "crowd-00:"], ["2/2", "crowd-01:"]]
    assert shown[0] == ("crowd-00", 0)
    assert len(shown) == sum(s.frames for s in report.scenes)
    overall = report.overall
    assert 0 < overall.j < 0.7
    assert overall.leakage > 0.01
    assert overall.false_share == 1.0
    again = run_suite("crowd", root, Holds(), scenes=2, seed=5, height=HEIGHT)
    assert [s.objects for s in again.scenes] == [s.objects for s in report.scenes]

    far = run_suite("far", root, Holds(), scenes=1, seed=5, height=2 * HEIGHT)
    assert [s.name for s in far.scenes] == ["far-00"]
    assert far.goals == report.goals

    found = report.to_json()
    assert json.loads(json.dumps(found)) == found
    assert found["goals"]["j"] == {"value": 80, "at_least": True}
    assert found["overall"]["j"] == round(100 * overall.j, 3)
    assert found["overall"]["false_frames"] == 100.0
    assert set(found["scenes"]) == {"crowd-00", "crowd-01"}
    assert found["presence"] == {}

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.table())
    text = console.export_text()
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in text.splitlines() if "│" in line}
    assert rows["overall"][1].strip() == f"{100 * overall.j:.1f}"
    assert rows["goal"][1].strip() == "≥ 80 no"
    assert rows["out of"][-1].strip() == str(overall.hidden)
    assert "…" not in text


def test_goals() -> None:
    assert CROWD_GOALS["j"].met(80.0)
    assert not CROWD_GOALS["leakage"].met(3.0)
    assert CROWD_GOALS["swaps"].met(4.99)
    assert not Goal(1, True).met(float("nan"))


def test_the_troubles_are_reported_by_kind_with_presence(root: Path) -> None:
    report = run_suite("synthetic", root, Fitted(), scenes=1, height=HEIGHT, kinds=["plain", "cut"])
    assert list(report.kinds) == ["plain", "cut"]
    found = report.to_json()
    assert found["goals"] == {}
    assert found["kinds"]["cut"]["frames_out_of_sight"] == 20
    assert found["kinds"]["plain"]["false_frames"] is None
    assert set(found["presence"]) == {"mean probability", "calibrated"}
    seen = report.observations
    assert seen is not None
    assert len(seen.iou) > 10
    assert set(seen.scores) == {0.75}
    for name, result in report.presence.items():
        assert sum(b.masks for b in result.bins) == len(seen.iou), name
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.table())
    assert "expected calibration error" in console.export_text()


def test_weights_without_a_fitted_presence_are_reported_without(root: Path) -> None:
    report = run_suite("synthetic", root, Doubtful(), scenes=1, height=HEIGHT, kinds=["plain", "cut"])
    assert report.observations is not None
    assert np.isnan(report.observations.scores).all()
    assert set(report.to_json()["presence"]) == {"mean probability"}


def test_observations_are_the_scores_of_the_masks_that_were_given(root: Path) -> None:
    made = scene(root)
    tiny = tiny_model()
    tiny.config = replace(tiny.config, presence=(1.0, 0.0, 0.5, 0.0, -0.2, 0.0, 0.1))
    model = VideoSegmenter(tiny, MemoryConfig(mem_every=10), size=32)
    results = []

    class Notes:
        def new_state(self) -> Any:
            return model.new_state()

        def step(self, state: Any, frame: np.ndarray, prompt: Any = None) -> Any:
            results.append(model.step(state, frame, prompt))
            return results[-1]

    _, seen = run_scene(made, Notes())
    assert seen is not None
    expected = []
    for t, result in enumerate(results):
        features = presence_features(result.network_probabilities)
        scores = result.presence
        assert scores is not None
        for k, identity in enumerate(result.object_ids):
            if t > made.given[identity] and bool((result.label_map == identity).any()) and features[k, 0] > 0:
                mask, truth = result.label_map.numpy() == identity, made.truth[t] == identity
                iou = (mask & truth).sum() / (mask | truth).sum()
                expected.append((*features[k].tolist(), float(scores[k]), iou))
    table = np.array(expected)
    assert np.column_stack([seen.features, seen.scores, seen.iou]) == pytest.approx(table)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"suite": "crowds"}, "no suite 'crowds'; available: crowd, far, synthetic"),
        ({"suite": "crowd", "height": 20}, "scenes of 20 pixels are too small"),
        ({"suite": "crowd", "scenes": 0}, "0 scenes leave nothing to measure"),
        (
            {"suite": "synthetic", "kinds": ["fog"]},
            "no kind 'fog' of synthetic scene; available: plain, occl",
        ),
    ],
)
def test_wrong_requests(root: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        run_suite(options.pop("suite"), root, Holds(), **options)


def test_labels_of_another_size_are_refused(root: Path) -> None:
    class Wrong(Holds):
        def step(self, state: Any, frame: np.ndarray, prompt: Any = None) -> Any:
            return SimpleNamespace(label_map=np.zeros((3, 4), np.int32))

    with pytest.raises(UsageError, match=r"labels of \(3, 4\) for \(48, 64\)"):
        run_suite("crowd", root, Wrong(), scenes=1, height=HEIGHT)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "nothing to evaluate"),
        ({"root": "x", "data": "y"}, "--data without --suite has no effect"),
        ({"root": "x", "scenes": 2, "kinds": ["cut"]}, "--scenes, --kind without --suite"),
        ({"suite": "crowd"}, "--suite crowd needs --data"),
        ({"suite": "crowd", "data": "y", "root": "x"}, "a data set with --suite crowd has no effect"),
        ({"suite": "crowd", "data": "y", "kinds": ["cut"]}, "--kind with --suite crowd"),
        ({"suite": "synthetic", "data": "y", "max_frames": 5}, "--max-frames with --suite synthetic"),
    ],
)
def test_options_that_do_not_go_together(given: dict[str, Any], said: str) -> None:
    names = ("root", "suite", "data", "scenes", "kinds", "clips", "max_frames")
    with pytest.raises(UsageError, match=said):
        check_options(**{name: given.get(name) for name in names})


def test_the_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tiny_weights(tmp_path)
    given = ["--suite", "synthetic", "--data", str(root), "--model", weights, "--kind", "plain"]
    given += ["--scenes", "1", "--seed", "4", "--size", "32", "--height", str(HEIGHT), "--json"]
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *given])
    captured = capsys.readouterr()
    assert ended.value.code == 0, captured.err
    found = json.loads(captured.out)
    assert (found["suite"], found["seed"], list(found["scenes"])) == ("synthetic", 4, ["plain-00"])
    assert found["overall"]["j"] is not None
    assert found["height"] == HEIGHT
    assert "1/1 plain-00: J 1: " in captured.err
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "--suite", "crowd", "--data", str(tmp_path), "--model", weights])
    assert ended.value.code == 2
    assert "has no pictures to compose scenes from" in capsys.readouterr().err


# --- the fit -------------------------------------------------------------------------------------


class Doubtful(Holds):
    """Keeps masks in place, with probabilities that decrease with the age of the mask."""

    def new_state(self) -> dict[int, np.ndarray]:
        self.ages: dict[int, int] = {}
        return super().new_state()

    def step(self, state: Any, frame: np.ndarray, prompt: Any = None) -> Any:
        labels = super().step(state, frame, prompt).label_map
        ids = tuple(state)
        self.ages = {i: self.ages.get(i, -1) + 1 for i in ids}
        planes = torch.full((len(ids) + 1, *labels.shape), 0.01)
        for k, identity in enumerate(ids, 1):
            planes[k, labels == identity] = 0.5 + 0.45 * 0.9 ** self.ages[identity]
        planes[0] = 1 - planes[1:].sum(0)
        planes[0, labels > 0] = 0.0
        return SimpleNamespace(label_map=labels, network_probabilities=planes, object_ids=ids)


class Fitted(Doubtful):
    """Also returns a presence, the same for all objects."""

    def step(self, state: Any, frame: np.ndarray, prompt: Any = None) -> Any:
        result = super().step(state, frame, prompt)
        result.presence = torch.full((len(result.object_ids),), 0.75)
        return result


def test_the_fit_knows_what_the_probabilities_knew(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.evaluation.suites.pictures.HELD_OUT_PEOPLE", 4)
    constants, seen = fit_presence(root, Doubtful(), crowds=2, troubles=1, height=HEIGHT, kinds=["plain"])
    assert 0.05 < seen.right.mean() < 0.95
    assert [name for name, w in zip(FEATURES, constants.weights, strict=True) if w] == ["mean", "size"]
    total = seen.features @ np.array(constants.weights) + constants.intercept
    fitted = reliability(1 / (1 + np.exp(-total)), seen.iou)
    raw = reliability(seen.features[:, 0], seen.iou)
    assert fitted.error < 0.08 < raw.error
    assert fitted.brier < raw.brier
    again = fit_presence(root, Doubtful(), crowds=2, troubles=1, height=HEIGHT, kinds=["plain"])[0]
    assert again == constants


def test_nothing_is_fitted_to_masks_that_tell_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.evaluation.suites.pictures.HELD_OUT_PEOPLE", 4)
    with pytest.raises(UsageError, match="the segmenter returns no probabilities"):
        fit_presence(root, Holds(), crowds=1, troubles=0, height=HEIGHT)

    class Elsewhere(Doubtful):
        def step(self, state: Any, frame: np.ndarray, prompt: Any = None) -> Any:
            result = super().step(state, frame, prompt)
            result.label_map = np.roll(result.label_map, (HEIGHT // 2, 11), (0, 1))
            return result

    with pytest.raises(UsageError, match=r"none of \d+ masks are right"):
        fit_presence(root, Elsewhere(), crowds=1, troubles=0, height=HEIGHT)


def test_memory_settings_reach_the_segmenter(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def noted(suite: str, data: str, segmenter: VideoSegmenter, **options: Any) -> Any:
        asked.append((segmenter.memory_config, segmenter.size, options["height"]))
        raise UsageError("enough")

    monkeypatch.setattr(runner, "run_suite", noted)
    given = ["evaluate", "--suite", "crowd", "--data", str(root), "--model", tiny_weights(tmp_path)]
    settings = [
        "--mem-every",
        "3",
        "--top-k",
        "20",
        "--no-long-term",
        "--search-window",
        "96",
        "--size",
        "64",
    ]
    for more in (settings, ["--search-window", "3"]):
        with pytest.raises(SystemExit) as ended:
            main([*given, *more])
        assert ended.value.code == 2
    assert asked == [(MemoryConfig(mem_every=3, top_k=20, enable_long_term=False, search_window=96), 64, 480)]
    assert "search_window=3 is not allowed: at least 64" in capsys.readouterr().err


def test_the_fit_is_kept_in_the_weights_file(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("jobs.evaluation.suites.pictures.HELD_OUT_PEOPLE", 4)
    path = tmp_path / "weights.safetensors"
    shutil.copy(find_weights("xmem-lite"), path)
    before = load_model(path)
    options = ["--data", str(root), "--crowds", "1", "--troubles", "0", "--height", str(HEIGHT)]
    monkeypatch.setattr(sys, "argv", ["fitting", str(path), *options])
    fitting.main()
    after = load_model(path)
    assert after.config.presence is not None
    assert after.config.presence != before.config.presence
    assert model_fingerprint(after) == model_fingerprint(before)

    content = path.read_bytes()
    monkeypatch.setattr(sys, "argv", ["fitting", str(path), "--data", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit) as stop:
        fitting.main()
    assert stop.value.code == 2
    assert str(tmp_path / "nothing") in capsys.readouterr().err
    assert path.read_bytes() == content

    # A name or another format would become a new file of that name.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fitting", "xmem-lite", *options])
    with pytest.raises(SystemExit) as stop:
        fitting.main()
    assert stop.value.code == 2
    assert "which xmem-lite is not" in capsys.readouterr().err
    assert not (tmp_path / "xmem-lite").exists()
