"""Masks on disk: palettes, zip files, going on after an interruption, averaging, and no invented scores."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from rich.console import Console
from support.labelled import Replay, square, write_clip
from support.small_net import SMALL_MEMORY, frame_at, small_model
from support.small_net import square as mask_of
from support.tiny import tiny_weights

from jobs.cli.app import main
from jobs.evaluation.davis import run
from jobs.evaluation.ensemble import Ensemble
from jobs.evaluation.peak_memory import PeakMemory
from jobs.evaluation.pictures import palette_png
from pipeline.base.errors import UsageError
from pipeline.prompts.index_png import decode_index_png
from xmem_core import Prompt, VideoSegmenter

ONE = [square(10, 5 + i) for i in range(4)]
TWO = [square(2, 3 + i, value=1) + square(20, 30 + i, value=2) for i in range(4)]


def read(path: Path) -> np.ndarray:
    return decode_index_png(path.read_bytes(), str(path))


def test_a_palette_png_has_the_colours_of_davis_and_the_indices() -> None:
    labels = np.arange(256).reshape(16, 16)
    data = palette_png(labels)
    assert np.array_equal(decode_index_png(data, "a"), labels)
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None
    colours = picture[..., ::-1].reshape(256, 3)
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 4: (0, 0, 128), 8: (64, 0, 0)}
    assert {i: tuple(colours[i].tolist()) for i in known} == known


def test_masks_are_written_and_packed_and_what_cannot_be_scored_has_no_number(tmp_path: Path) -> None:
    root, out = tmp_path / "set", tmp_path / "out"
    write_clip(root, "scored", TWO)
    write_clip(root, "unknown", [square(2, 3), None, None, None])
    lines: list[str] = []
    report = run(root, Replay(TWO, ONE), masks_out=out, zipped=True, progress=lines.append)
    assert "1 clips have no truth and no score" in lines[0]
    assert "J&F -" in lines[2]
    assert (report.clips[0].j, report.clips[1].j, report.j) == (1.0, None, 1.0)
    figures = report.to_json()
    assert figures["clips"]["unknown"]["J&F"] is None
    assert json.loads(json.dumps(figures))["clips"]["unknown"]["J"] is None
    text = io.StringIO()
    Console(file=text, width=120).print(report.table())
    assert "overall (1 of 2 clips)" in text.getvalue()
    (row,) = [line for line in text.getvalue().splitlines() if "unknown" in line]
    assert row.count(" - ") == 3
    for i, labels in enumerate(TWO):
        assert np.array_equal(read(out / "scored" / f"{i:05d}.png"), labels)
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert sorted(archive.namelist()) == sorted(
            f"{clip}/{i:05d}.png" for clip in ("scored", "unknown") for i in range(4)
        )


def test_where_nothing_can_be_scored_there_is_no_number_at_all(tmp_path: Path) -> None:
    write_clip(tmp_path / "set", "a", [square(2, 3), None, None, None])
    report = run(tmp_path / "set", Replay(ONE), masks_out=tmp_path / "out")
    assert report.to_json()["overall"] == {"J&F": None, "J": None, "F": None}


def test_a_server_of_youtube_vos_gets_a_folder_and_the_frames_that_it_asks_for(tmp_path: Path) -> None:
    part = tmp_path / "set" / "valid"
    write_clip(part, "0a", [square(2, 3), None, square(20, 30, value=2), None], layer=".")
    (part / "meta.json").write_text('{"videos": {}}')
    write_clip(tmp_path / "set" / "valid_all_frames", "0a", [*ONE, *ONE], layer=".")
    replay = Replay([*ONE, *ONE])
    run(tmp_path / "set", replay, masks_out=tmp_path / "out", all_frames=True, zipped=True)
    assert len(replay.states[0]["frames"]) == 8
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert archive.namelist() == [f"Annotations/0a/{i:05d}.png" for i in range(4)]


def test_davis_2016_masks_are_white(tmp_path: Path) -> None:
    write_clip(tmp_path / "set", "cows", [t * 255 for t in ONE])
    (tmp_path / "set/ImageSets/2016").mkdir(parents=True)
    (tmp_path / "set/ImageSets/2016/val.txt").write_text("cows\n")
    run(tmp_path / "set", Replay(ONE), masks_out=tmp_path / "out")
    assert np.array_equal(read(tmp_path / "out/cows/00002.png"), ONE[2].astype(np.int32) * 255)


class Breaks(Replay):
    """Fails on a frame of its second clip."""

    def step(self, state: dict[str, Any], frame: Any, prompt: Any = None) -> Any:
        if len(self.states) == 2 and len(state["frames"]) == 2:
            raise KeyboardInterrupt
        return super().step(state, frame, prompt)


def test_an_interrupted_run_goes_on_with_the_clip_that_was_not_finished(tmp_path: Path) -> None:
    root, out = tmp_path / "set", tmp_path / "out"
    for name in ("a", "b", "c"):
        write_clip(root, name, TWO)
    with pytest.raises(KeyboardInterrupt):
        run(root, Breaks(TWO, TWO, TWO), masks_out=out)
    replay, lines = Replay(TWO, TWO), list[str]()
    report = run(root, replay, masks_out=out, progress=lines.append)
    assert len(replay.states) == 2
    assert "finished before" in lines[1]
    assert "finished before" not in lines[2]
    assert [(clip.name, clip.j, clip.frames) for clip in report.clips] == [(n, 1.0, 4) for n in "abc"]
    again = run(root, Replay(), masks_out=out)
    assert again == report
    for damage in ("{", "[]", '{"name": "b"}'):
        (out / ".evaluation" / "b.json").write_text(damage)
        replay = Replay(TWO)
        assert run(root, replay, masks_out=out).j == 1.0
        assert len(replay.states) == 1
    (out / ".evaluation" / "settings.json").write_text("[]")
    with pytest.raises(UsageError, match="holds no settings"):
        run(root, Replay(), masks_out=out)


def test_a_zip_lies_beside_the_folder_however_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_clip(tmp_path / "set", "a", ONE)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run(tmp_path / "set", Replay(ONE), masks_out=".", zipped=True)
    assert (tmp_path / "here.zip").is_file()


def test_results_of_another_kind_are_not_mixed(tmp_path: Path) -> None:
    root, out = tmp_path / "set", tmp_path / "out"
    write_clip(root, "a", ONE)
    run(root, Replay(ONE), masks_out=out, settings={"flip": False})
    with pytest.raises(UsageError, match=r"other settings \(flip was False, now True\): give another folder"):
        run(root, Replay(ONE), masks_out=out, settings={"flip": True})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="full holds other files: give a new folder"):
        run(root, Replay(ONE), masks_out=tmp_path / "full")
    with pytest.raises(UsageError, match=r"letter\.txt cannot be used"):
        run(root, Replay(ONE), masks_out=tmp_path / "full" / "letter.txt")
    for options in ({"zipped": True}, {"save_scores": True}):
        with pytest.raises(UsageError, match="needs --masks-out"):
            run(root, Replay(ONE), **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--save-scores: this segmenter gives no probabilities"):
        run(root, Replay(ONE), masks_out=tmp_path / "scores", save_scores=True)
    with pytest.raises(UsageError, match="object 300 does not fit a palette PNG"):
        run(root, Replay([o.astype(np.int32) * 300 for o in ONE]), masks_out=tmp_path / "many")


def test_an_ensemble_of_one_is_that_one_and_of_mirrored_frames_is_symmetric() -> None:
    segmenter = VideoSegmenter(small_model(), SMALL_MEMORY)
    ids = {7: mask_of(48, 64, 4, 6, 14), 2: mask_of(48, 64, 24, 30, 16)}
    assert Ensemble([segmenter]).device == segmenter.device
    alone, one, both = segmenter.new_state(), Ensemble([segmenter]), Ensemble([segmenter], flip=True)
    state, pair, mirrored = one.new_state(), both.new_state(), both.new_state()
    for t in range(4):
        frame, prompt = frame_at(t), Prompt(ids) if t == 0 else None
        turned = Prompt({i: m[:, ::-1] for i, m in ids.items()}) if t == 0 else None
        expected = segmenter.step(alone, frame, prompt)
        got = one.step(state, frame, prompt)
        assert torch.equal(got.probabilities, expected.probabilities)
        mean = both.step(pair, frame, prompt)
        other = both.step(mirrored, np.ascontiguousarray(frame[:, ::-1]), turned)
        torch.testing.assert_close(mean.probabilities, other.probabilities.flip(2))
        assert mean.object_ids == (7, 2)
    assert not torch.equal(mean.probabilities, expected.probabilities)


def test_sizes_are_averaged_at_the_frames_size() -> None:
    segmenters = [VideoSegmenter(small_model(), SMALL_MEMORY, size=s) for s in (32, None)]
    together, states = Ensemble(segmenters), [s.new_state() for s in segmenters]
    state = together.new_state()
    prompt = Prompt({1: mask_of(48, 64, 4, 6, 14)})
    for t in range(3):
        given = prompt if t == 0 else None
        planes = [s.step(own, frame_at(t), given) for s, own in zip(segmenters, states, strict=True)]
        mean = sum(p.probabilities for p in planes) / 2
        torch.testing.assert_close(together.step(state, frame_at(t), given).probabilities, mean)
    with pytest.raises(ValueError, match="give at least one"):
        Ensemble([])


def test_peak_memory_sees_what_was_allocated_meanwhile() -> None:
    before = PeakMemory().bytes()
    if before is None:
        pytest.skip("this system does not tell")
    memory = PeakMemory()
    block = np.ones(60_000_000, np.uint8)
    del block
    peak = memory.bytes()
    assert peak is not None
    assert peak > 60_000_000


def test_the_command_writes_masks_scores_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = tmp_path / "set", tmp_path / "out"
    write_clip(root, "a", TWO)
    command = ["evaluate", str(root), "--model", tiny_weights(tmp_path), "--threads", "1", "--json"]
    command += ["--masks-out", str(out), "--zip", "--save-scores", "--flip", "--size", "32", "--size", "0"]
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            main(command)
        assert stopped.value.code in (0, None)
    told = capsys.readouterr()
    assert "finished before" in told.err
    first, second = told.out.split("}\n{")
    assert json.loads(first + "}") == json.loads("{" + second)
    with np.load(out / "scores/a/00003.npz") as scores:
        assert scores["object_ids"].tolist() == [1, 2]
        planes, labels = scores["probabilities"].astype(int), read(out / "a/00003.png")
    assert planes.shape == (3, 40, 60)
    # Rounded to 256 levels, the label's probability is still the highest, or as high as that.
    assert np.array_equal(np.take_along_axis(planes, labels[None].astype(np.int64), 0)[0], planes.max(0))
    settings = json.loads((out / ".evaluation/settings.json").read_text())
    assert settings["sizes"] == [32, None]
    assert settings["flip"] is True
