"""Streams whose network is compiled: their record, their resumption, and the same rows for any cut."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.tiny import CAPPED_MEMORY, tiny_weights
from support.videos import make_video

from pipeline.analytics.query import query
from pipeline.base.errors import SettingsConflictError, UsageError
from pipeline.prompts.resolving import PromptSet
from pipeline.tracking.files.track import track
from pipeline.tracking.segmenters import open_segmenter
from pipeline.tracking.settings import ModelSettings, TrackSettings
from xmem_core import MemoryConfig, compiled

pytestmark = pytest.mark.usefixtures("one_thread")

FRAMES = 12


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_video(tmp_path_factory.mktemp("video") / "clip.mkv", FRAMES, width=80, height=64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_weights(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was compiled, by a backend that takes no time and whose results differ from the network's."""
    made: list[object] = []

    def compiles(graph: Callable[..., Sequence[Any]], given: object) -> Callable[..., Sequence[Any]]:
        made.append(graph)
        return lambda *inputs: tuple(found * (1 + 2**-12) for found in graph(*inputs))

    monkeypatch.setattr(compiled, "compile_options", lambda device: {"backend": compiles})
    return made


PROMPTS = PromptSet.from_record(
    {
        "version": 1,
        "objects": [
            {"frame": frame, "id": i, "polygons": [[x, 8, x + 24, 8, x + 24, 40, x, 40]]}
            for frame, i, x in ((0, 1, 4), (4, 2, 44))
        ],
    }
)


def rows(video: Path, out: Path, model: str, **changes: Any) -> list[Any]:
    arguments: dict[str, Any] = {"chunk_frames": 50, "compile": True, "memory": CAPPED_MEMORY}
    track(video, out, prompts=PROMPTS, model=model, stream_id="cam", threads=1, dtype="float32",
          snapshot_chunks=1, **(arguments | changes))  # fmt: skip
    found: list[Any] = query(
        out, "select frame_index, object_id, mask_rle, score from tracks order by all"
    ).to_pylist()
    return found


def settings_of(out: Path) -> dict[str, Any]:
    record = json.loads((out / "streams" / "cam.json").read_text())
    settings: dict[str, Any] = record["settings"]
    return settings


def test_any_cut_gives_the_same_rows(tmp_path: Path, video: Path, model: str, backend: list[object]) -> None:
    once = rows(video, tmp_path / "once", model)
    assert len(once) == FRAMES + FRAMES - 4
    assert once != rows(video, tmp_path / "plain", model, compile=False)
    for limit in (5, None):
        tried = len(backend)
        found = rows(video, tmp_path / "cut", model, chunk_frames=2, max_frames=limit)
        assert len(backend) > tried + 1  # a new segmenter, which compiles all again
    assert found == once


def test_a_stream_goes_on_as_it_was_begun_and_earlier_ones_without(
    tmp_path: Path, video: Path, model: str
) -> None:
    rows(video, tmp_path / "on", model, max_frames=2)
    assert settings_of(tmp_path / "on")["compile"] is True
    assert TrackSettings.from_dict(settings_of(tmp_path / "on")).model.compile
    with pytest.raises(SettingsConflictError, match="compile was True, now False"):
        rows(video, tmp_path / "on", model, compile=False)
    rows(video, tmp_path / "off", model, max_frames=2, compile=False)
    assert "compile" not in settings_of(tmp_path / "off")  # as earlier versions wrote it
    assert not TrackSettings.from_dict(settings_of(tmp_path / "off")).model.compile
    with pytest.raises(SettingsConflictError, match="compile was False, now True"):
        rows(video, tmp_path / "off", model)
    assert len(rows(video, tmp_path / "off", model, compile=False)) == FRAMES + FRAMES - 4


def test_a_window_and_compiled_functions_exclude_each_other(model: str) -> None:
    assert open_segmenter(ModelSettings(model, compile=True)).compiled
    with pytest.raises(UsageError, match=r"search_window=96 is not allowed with compile"):
        open_segmenter(ModelSettings(model, compile=True), MemoryConfig(search_window=96))
