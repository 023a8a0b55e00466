"""Plots of a stream: the files that are written, their content, and what is refused."""

from __future__ import annotations

import builtins
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from support.videos import make_video
from support.walks import Walk, random_walk, record, walked_folder

from pipeline.base.errors import SourceError, UsageError
from pipeline.plots import figures
from pipeline.plots.stream_data import load_stream
from pipeline.plots.stream_report import KINDS, plot
from pipeline.zones.config import ZoneSet, parse_zones

ZONES: ZoneSet = parse_zones(
    {
        "zones": [{"name": "door", "units": "share", "polygon": [[0, 0], [0.5, 0], [0.5, 1], [0, 1]]}],
        "lines": [{"name": "kerb", "from": [50, 0], "to": [50, 100]}],
    }
)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plots")
    walked_folder(str(folder), "gate", random_walk(5, with_mask=True))
    return folder


def test_a_report_and_a_png_of_each_kind(out: Path, tmp_path: Path) -> None:
    video = make_video(tmp_path / "clip.mp4", 3, width=100, height=100)
    written = plot(out, tmp_path / "plots", zones=ZONES, video=video)
    names = [f"{kind}.png" for kind in KINDS] + ["report.html"]
    assert written == [str(tmp_path / "plots" / name) for name in names]
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == sorted(names)
    for name in names[:-1]:
        picture = cv2.imread(str(tmp_path / "plots" / name))
        assert picture is not None
        assert picture.std() > 5  # something is drawn
    html = (tmp_path / "plots" / "report.html").read_text()
    assert html.count("<img ") == html.count("data:image/png;base64,") == len(KINDS)
    assert not re.search(r"https?://|<script|<link", html)
    data = load_stream(out)
    assert html.count("<tr>") == 1 + len(data.objects)


def test_only_some_and_again(out: Path, tmp_path: Path) -> None:
    for _ in range(2):  # files are replaced
        written = plot(out, tmp_path, kinds=["occupancy", "presence"], first=5)
        assert [Path(p).name for p in written] == ["presence.png", "occupancy.png", "report.html"]


def test_the_same_rows_give_the_same_picture(out: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        plot(out, tmp_path / name, kinds=["trajectories"])
    assert (tmp_path / "a/trajectories.png").read_bytes() == (tmp_path / "b/trajectories.png").read_bytes()


def test_a_live_stream_and_one_without_objects(tmp_path: Path) -> None:
    walked_folder(str(tmp_path / "out"), "live", random_walk(6, wall=True, with_mask=True))
    assert len(plot(tmp_path / "out", tmp_path / "a")) == len(KINDS) + 1
    walked_folder(str(tmp_path / "none"), "none", Walk({f: [] for f in range(5)}))
    written = plot(tmp_path / "none", tmp_path / "b")
    assert [Path(p).name for p in written] == ["presence.png", "occupancy.png", "report.html"]


def test_lines_are_broken_where_an_object_is_out_of_sight(tmp_path: Path) -> None:
    frames: Mapping[int, Sequence[Any]] = {
        f: [record(f, 1, None if f in (3, 4) else (10.0 + 5 * f, 50.0))] for f in range(9)
    }
    walked_folder(str(tmp_path), "gate", Walk(frames))
    data = load_stream(tmp_path)
    axes = figures.trajectories(data).axes[0]
    paths = [np.asarray(line.get_xdata(), float).tolist() for line in axes.lines if len(line.get_xdata()) > 1]  # type: ignore[arg-type]
    assert paths == [[10, 15, 20], [35, 40, 45, 50]]
    area = np.asarray(figures.measures(data).axes[0].lines[0].get_ydata(), float)
    assert np.isnan(area).tolist() == [False] * 3 + [True] * 2 + [False] * 4


def test_names_cannot_break_out_of_the_report(tmp_path: Path) -> None:
    frames = {f: [record(f, 1, (50, 50), category="<script>alert(1)</script>")] for f in range(3)}
    walked_folder(str(tmp_path / "out"), "gate", Walk(frames))
    plot(tmp_path / "out", tmp_path / "plots", kinds=["presence"])
    html = (tmp_path / "plots" / "report.html").read_text()
    assert "<script" not in html
    assert "<td>&lt;script&gt;alert(1)&lt;/script&gt;</td>" in html


def test_what_is_refused(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="plots 'pie': choose from presence, trajectories, heat, measures"):
        plot(out, tmp_path, kinds=["presence", "pie"])
    other = parse_zones({"zones": [{"name": "a", "polygon": [[0, 0], [1, 0], [1, 1]], "streams": "yard"}]})
    with pytest.raises(UsageError, match="none of the zones and lines is for stream 'gate'"):
        plot(out, tmp_path, zones=other)
    larger = make_video(tmp_path / "larger.mp4", 3, width=160, height=120)
    with pytest.raises(UsageError, match="frames of 160x120 pixels, the masks 100x100; give the video that"):
        plot(out, tmp_path, video=larger)
    with pytest.raises(SourceError):
        plot(out, tmp_path, video=tmp_path / "missing.mp4")
    load = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return load(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"plots need matplotlib.*: pip install 'xmem-pipeline\[plot\]'"):
        plot(out, tmp_path)
    assert not list(tmp_path.glob("*.png"))
