"""Plots of a stream as PNG files, and all of them in one HTML file that needs no network."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, Literal, get_args

from pipeline.base.errors import UsageError
from pipeline.base.picture_size import MAX_PIXELS
from pipeline.base.redaction import redacted
from pipeline.draw.frames import frames_with_tracks
from pipeline.draw.look import Image
from pipeline.draw.output_file import finished_file
from pipeline.plots import figures
from pipeline.plots.stream_data import ObjectData, StreamData, load_stream, mask_heat, zone_occupancy
from pipeline.tracks.reader import TrackReader
from pipeline.video.sources import open_source
from pipeline.zones.config import ZoneSet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Kind = Literal["presence", "trajectories", "heat", "measures", "occupancy"]
KINDS: tuple[Kind, ...] = get_args(Kind)
REPORT = "report.html"
_DPI = 110
_MAX_OBJECTS = 500


def plot(
    root: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    stream_id: str | None = None,
    video: str | os.PathLike[str] | None = None,
    zones: ZoneSet | None = None,
    kinds: Sequence[str] = KINDS,
    first: int = 0,
    last: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
    video_storage_options: Mapping[str, Any] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> list[str]:
    """Plot one stream of an output folder.

    Args:
        root: output folder of tracking.
        output: folder (path or fsspec URI) for a PNG per kind and `report.html`; files there are replaced.
        stream_id: stream to plot; may be left out if the folder has one only.
        video: the video that was tracked: its frame `first` is drawn below trajectories and heat map.
        zones: zones and lines that are drawn, and whose occupancy is plotted.
        kinds: "presence" (timeline of each object), "trajectories", "heat" (how often pixels were covered),
            "measures" (area, score and presence over time), "occupancy".
        first, last: frames to plot, inclusive.
        storage_options, video_storage_options: for the fsspec file systems of `root` and `output`, and of
            `video`.

    Returns:
        the files written, the report last.

    Raises:
        UsageError: matplotlib is not installed, there is no such stream, kind or frame, or the video is
            another one. SourceError, StoreError: a file cannot be read or written.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise UsageError(f"plots {', '.join(map(repr, unknown)) or '[]'}: choose from {', '.join(KINDS)}")
    data = load_stream(root, stream_id, first=first, last=last, storage_options=storage_options)
    here = zones.of_stream(data.stream_id) if zones is not None else None
    if zones is not None and not here:
        raise UsageError(f"none of the zones and lines is for stream {data.stream_id!r}")
    picture = None
    if video is not None:
        picture = _picture(os.fspath(video), root, data, storage_options, video_storage_options, max_pixels)

    def heat() -> Figure:
        return figures.heat_map(*mask_heat(root, data, storage_options), picture)

    def occupancy() -> Figure:
        held = zone_occupancy(root, data, here, storage_options) if here and here.zones else None
        return figures.occupancy(data, held)

    make: dict[str, Callable[[], Figure]] = {
        "presence": lambda: figures.presence(data),
        "trajectories": lambda: figures.trajectories(data, picture, here),
        "heat": heat,
        "measures": lambda: figures.measures(data),
        "occupancy": occupancy,
    }
    needs_objects = {"trajectories", "heat", "measures"}
    wanted = [kind for kind in KINDS if kind in kinds and (data.size or kind not in needs_objects)]
    pictures: dict[str, bytes] = {kind: _png(make[kind]()) for kind in wanted}
    folder = os.fspath(output).rstrip("/")
    written = []
    for kind, png in pictures.items():
        written.append(_write(f"{folder}/{kind}.png", png, storage_options))
    html = report_html(data, pictures).encode()
    return [*written, _write(f"{folder}/{REPORT}", html, storage_options)]


def report_html(data: StreamData, pictures: Mapping[str, bytes]) -> str:
    """The report: facts, a table of the objects, and the plots (PNG bytes by kind)."""
    images = "\n".join(
        f'<img alt="{escape(kind)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for kind, png in pictures.items()
    )
    title = escape(f"{data.stream_id}: frames {data.first} to {data.last}")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body {{ font: 15px/1.45 system-ui, sans-serif; color: #1f2933;
  max-width: 72rem; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.4rem }} h2 {{ font-size: 1.1rem; margin-top: 2rem }} img {{ max-width: 100% }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
td, th {{ padding: .2rem .8rem .2rem 0; text-align: right; border-bottom: 1px solid #e3e8ed }}
td:first-child, th:first-child {{ text-align: left }} dt {{ float: left; width: 9rem; color: #5b6b7b }}
</style></head><body>
<h1>{title}</h1>
<dl>{_facts(data)}</dl>
{images}
<h2>Objects</h2>
{_table(data)}
</body></html>
"""


def _facts(data: StreamData) -> str:
    known = data.facts
    lines = {"Source": redacted(str(known.get("source") or "")), "State": known.get("state")}
    if data.size is not None:
        lines["Frame"] = f"{data.size[1]} x {data.size[0]} pixels"
    if data.duration is not None:
        lines["Duration"] = f"{data.duration:.1f} s"
    lines["Model"] = known.get("model")
    lines["Objects"] = str(len(data.objects))
    lost = sum(int(gap["frames_lost"] or 0) for gap in data.gaps)
    if data.gaps:
        lines["Input lost"] = f"{lost} frames, {len(data.gaps)} events"
    if data.every > 1:
        lines["Thinned"] = f"one frame in {data.every} is shown"
    return "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in lines.items() if v)


def _table(data: StreamData) -> str:
    names = ("object", "category", "first frame", "last frame", "frames in sight", "mean area", "mean score")
    rows = ["".join(f"<th>{name}</th>" for name in names)]
    rows += ["".join(f"<td>{escape(cell)}</td>" for cell in _cells(o)) for o in data.objects[:_MAX_OBJECTS]]
    left_out = len(data.objects) - _MAX_OBJECTS
    note = f"<p>{left_out} more objects are not listed.</p>" if left_out > 0 else ""
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>" + note


def _cells(found: ObjectData) -> list[str]:
    seen = found.frames[found.visible]
    if not seen.size:
        return [str(found.object_id), found.category or "", "", "", "0", "", ""]
    score = found.score[found.visible].mean()
    return [
        str(found.object_id),
        found.category or "",
        str(seen[0]),
        str(seen[-1]),
        f"{seen.size} of {found.frames.size}",
        f"{found.area[found.visible].mean():.0f}",
        f"{score:.2f}",
    ]


def _picture(
    video: str,
    root: str | os.PathLike[str],
    data: StreamData,
    storage_options: Mapping[str, Any] | None,
    video_storage_options: Mapping[str, Any] | None,
    max_pixels: int,
) -> Image:
    reader = TrackReader(root, data.stream_id, storage_options)
    with open_source(video, storage_options=video_storage_options, max_pixels=max_pixels) as source:
        frame = next(iter(frames_with_tracks(source, reader.at, data.first, data.first)), None)
    if frame is None:
        raise UsageError(f"{video} has no frame {data.first}; give the video that was tracked")
    if data.size is not None and frame.size != data.size:
        raise UsageError(
            f"{video} has frames of {frame.size[1]}x{frame.size[0]} pixels, the masks {data.size[1]}x"
            f"{data.size[0]}; give the video that was tracked"
        )
    return frame.image


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": "xmem"})
    return buffer.getvalue()


def _write(target: str, content: bytes, storage_options: Mapping[str, Any] | None) -> str:
    with finished_file(target, storage_options) as path:
        path.write_bytes(content)
    return target
