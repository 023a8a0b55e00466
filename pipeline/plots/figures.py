"""Figures of one stream's tracks, by matplotlib without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.base.errors import UsageError
from pipeline.draw.look import Image
from pipeline.draw.overlay import object_color
from pipeline.plots.stream_data import ObjectData, StreamData
from pipeline.zones.config import ZoneSet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INSTALL = "pip install 'xmem-pipeline[plot]'"
MAX_LINES = 60
"""Objects in the timeline, at most."""
MAX_CURVES = 12
"""Objects whose area and score are drawn, at most."""
_WIDTH = 11.0
_INK, _GRID, _LOST = "#1f2933", "#d7dde3", "#c0392b"


def presence(data: StreamData) -> Figure:
    """Timeline: when each object was in sight, corrected and removed, and what of the input was lost."""
    shown, left_out = _longest(data.objects, MAX_LINES)
    title = "Presence" + (f" ({left_out} more objects were in sight for less long)" if left_out else "")
    figure, axes = _figure(0.9 + 0.24 * max(3, len(shown)), title)
    half = data.every / 2
    for line, found in enumerate(shown):
        color = _color(found)
        axes.plot(data.times([found.frames[0], found.frames[-1]]), [line, line], color=color, lw=1, alpha=0.4)
        spans = [data.times([a - half, b + half]) for a, b in found.spans(data.every)]
        axes.broken_barh([(a, b - a) for a, b in spans], (line - 0.3, 0.6), color=color, lw=0)
    lines = {o.object_id: line for line, o in enumerate(shown)}
    for kind, marker, name in (("corrected", "^", "corrected"), ("object_removed", "x", "removed")):
        marks = [e for e in data.events if e["kind"] == kind and e["object_id"] in lines]
        axes.scatter(
            data.times([e["frame_index"] for e in marks]),
            [lines[e["object_id"]] for e in marks],
            marker=marker,
            s=28,
            color=_INK,
            label=name if marks else None,
            zorder=3,
        )
    _mark_gaps(axes, data)
    axes.set_yticks(range(len(shown)), [o.label for o in shown])
    axes.set_ylim(len(shown) - 0.4 if shown else 1, -0.6)
    _time_axis(axes, data)
    _legend(axes)
    return figure


def trajectories(data: StreamData, picture: Image | None = None, zones: ZoneSet | None = None) -> Figure:
    """Paths of the objects' foot points over a frame; interrupted where they were out of sight.

    Args:
        picture: H x W x 3 RGB frame of the video, drawn pale below them.
        zones: zones and lines to draw, too.
    """
    height, width = _size(data)
    figure, axes = _picture_figure(height, width, "Trajectories of foot points")
    _background(axes, picture, height, width)
    _draw_zones(axes, zones, height, width)
    for found in data.objects:
        color = _color(found)
        whole = found.visible & np.isfinite(found.foot).all(1)
        frames, foot = found.frames[whole], found.foot[whole]
        if not frames.size:
            continue
        for part in np.split(foot, np.flatnonzero(np.diff(frames) > data.every) + 1):
            axes.plot(part[:, 0], part[:, 1], color=color, lw=1.3)
        axes.plot(*foot[0], "o", color=color, ms=4)
        axes.plot(*foot[-1], "s", color=color, ms=4)
        if len(data.objects) <= MAX_CURVES:
            axes.annotate(found.label, foot[-1], (3, 3), textcoords="offset points", color=color, fontsize=8)
    axes.set_xlabel("pixels; circle: first, square: last sighting")
    return figure


def heat_map(heat: NDArray[np.float32], frames: int, picture: Image | None = None) -> Figure:
    """Share of the frames on which a pixel was covered by an object.

    Args:
        heat: H x W, 0 to 1. frames: how many were looked at. picture: as for `trajectories`.
    """
    height, width = heat.shape
    figure, axes = _picture_figure(height, width, "Heat map of masks", bar=True)
    _background(axes, picture, height, width)
    most = float(heat.max()) or 1.0
    opacity = np.clip(np.sqrt(heat / most), 0, 1) * 0.85 if picture is not None else 1.0
    image = axes.imshow(heat, cmap="inferno", vmin=0, vmax=most, alpha=opacity, extent=(0, width, height, 0))
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02)
    bar.solids.set_alpha(1)  # type: ignore[union-attr]
    bar.set_label(f"share of {frames} frames")
    return figure


def measures(data: StreamData) -> Figure:
    """Area, score and, where there is one, presence of the objects over time."""
    shown, left_out = _longest(data.objects, MAX_CURVES)
    pixels = float(np.prod(_size(data)))
    rows: list[tuple[str, Any]] = [("area, % of the frame", lambda o: 100 * o.area / pixels)]
    rows.append(("score", lambda o: o.score))
    if any(np.isfinite(o.presence).any() for o in shown):
        rows.append(("presence", lambda o: o.presence))
    title = "Area and score" + (f" (the {len(shown)} objects in sight longest)" if left_out else "")
    figure, first = _figure(2.1 * len(rows), title, rows=len(rows))
    for axes, (name, value) in zip(figure.axes, rows, strict=True):
        for found in shown:
            values = np.where(found.visible, value(found), np.nan)
            label = found.label if axes is first else None
            x, y = _broken(found.frames, values, data.every)
            axes.plot(data.times(x), y, color=_color(found), lw=1, label=label)
        _mark_gaps(axes, data, labelled=False)
        axes.set_ylabel(name)
        if name != rows[0][0]:
            axes.set_ylim(-0.03, 1.03)
        _time_axis(axes, data)
        axes.label_outer()
    _legend(first)
    return figure


def occupancy(
    data: StreamData, zones: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]] | None = None
) -> Figure:
    """Number of visible objects over time, and the mean number in each zone.

    Args:
        zones: by zone (N,) times and (N,) means, see `zone_occupancy`.
    """
    figure, axes = _figure(2.6, "Occupancy")
    x, y = _broken(data.frames, data.counts.astype(float), data.every)
    axes.plot(data.times(x), y, color="#8292a2", lw=0.8, drawstyle="steps-post", label="visible in the frame")
    for number, (name, (times, means)) in enumerate((zones or {}).items()):
        color = np.array(object_color(number + 1)) / 255
        if times.size:  # the last period goes on to the end
            times, means = np.append(times, data.times(data.last)), np.append(means, means[-1])
        axes.plot(times, means, color=color, lw=1.8, drawstyle="steps-post", label=f"zone {name} (mean)")
    _mark_gaps(axes, data)
    axes.set_ylabel("objects")
    axes.set_ylim(bottom=0)
    _time_axis(axes, data)
    _legend(axes)
    return figure


def _figure(height: float, title: str, rows: int = 1) -> tuple[Figure, Axes]:
    figure = _new(_WIDTH, height + 0.7)
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    for each in axes:
        each.grid(True, color=_GRID, lw=0.6)
        each.set_axisbelow(True)
    axes[0].set_title(title, loc="left", fontsize=11, color=_INK)
    return figure, axes[0]


def _picture_figure(height: int, width: int, title: str, bar: bool = False) -> tuple[Figure, Axes]:
    figure = _new(_WIDTH, min(14.0, (_WIDTH - (1.5 if bar else 0.7)) * height / width + 0.9))
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_aspect("equal")
    return figure, axes


def _new(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(f"plots need matplotlib, which is not installed: {INSTALL}") from error
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _background(axes: Axes, picture: Image | None, height: int, width: int) -> None:
    if picture is None:
        axes.set_facecolor("#f3f5f7")
        return
    grey = picture.mean(2, keepdims=True)
    pale = (0.55 * (0.4 * picture + 0.6 * grey) + 0.45 * 255).astype(np.uint8)
    axes.imshow(pale, extent=(0, width, height, 0))


def _draw_zones(axes: Axes, zones: ZoneSet | None, height: int, width: int) -> None:
    if zones is None:
        return

    def pixels(points: Sequence[tuple[float, float]], units: str) -> NDArray[np.float64]:
        scale = (width, height) if units == "share" else (1.0, 1.0)
        return np.array(points, float) * scale

    for zone in zones.zones:
        corners = pixels(zone.polygon, zone.units)
        axes.fill(corners[:, 0], corners[:, 1], facecolor="#2a7ab033", edgecolor="#2a7ab0", lw=1.2)
        axes.annotate(
            zone.name, corners[0], (4, -10), textcoords="offset points", color="#2a7ab0", fontsize=8
        )
    for line in zones.lines:
        start, end = pixels((line.start, line.end), line.units)
        arrow = {"arrowstyle": "->", "color": "#b0402a", "lw": 1.4}
        axes.annotate("", end, start, arrowprops=arrow)
        axes.annotate(line.name, start, (4, 4), textcoords="offset points", color="#b0402a", fontsize=8)


def _mark_gaps(axes: Axes, data: StreamData, labelled: bool = True) -> None:
    label = "input lost" if labelled else None
    for gap in data.gaps:
        lost = int(gap["frames_lost"] or 0)
        begin, end = data.times([gap["frame_index"] - max(lost, 1), gap["frame_index"]])
        axes.axvspan(begin, end, color=_LOST, alpha=0.25, lw=0.8, label=label)
        label = None


def _time_axis(axes: Axes, data: StreamData) -> None:
    begin, end = data.times([data.first, max(data.last, data.first + 1)])
    if data.clock == "wall":
        from matplotlib.ticker import FuncFormatter

        # Values are seconds since 1970; matplotlib's dates are days.
        dates: Any = import_module("matplotlib.dates")  # not typed
        locator = dates.AutoDateLocator(tz=UTC)
        ticks = [t * 86400 for t in locator.tick_values(*_days(begin, end))]
        formatter = dates.ConciseDateFormatter(locator, tz=UTC)
        axes.set_xticks([t for t in ticks if begin <= t <= end])
        labels = formatter.format_ticks([t / 86400 for t in axes.get_xticks()])
        named = dict(zip(axes.get_xticks(), labels, strict=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: named.get(value, "")))
        axes.set_xlabel(f"UTC, {formatter.get_offset()}".rstrip(", "))
    else:
        axes.set_xlabel("seconds" if data.clock == "seconds" else "frame_index")
    if end > begin:
        axes.set_xlim(begin, end)


def _days(begin: float, end: float) -> tuple[datetime, datetime]:
    return datetime.fromtimestamp(begin, UTC), datetime.fromtimestamp(end, UTC)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)


def _broken(
    frames: NDArray[np.int64], values: NDArray[np.float64], every: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Values with a NaN where frames are missing, so that no line is drawn across."""
    ends = np.flatnonzero(np.diff(frames) > every) + 1
    return np.insert(frames.astype(float), ends, frames[ends]), np.insert(values, ends, np.nan)


def _longest(objects: Sequence[ObjectData], most: int) -> tuple[list[ObjectData], int]:
    """The objects that were in sight longest, in their order, and how many are left out."""
    ranked = sorted(range(len(objects)), key=lambda at: -int(objects[at].visible.sum()))[:most]
    return [objects[at] for at in sorted(ranked)], max(0, len(objects) - most)


def _color(found: ObjectData) -> tuple[float, float, float]:
    red, green, blue = object_color(found.object_id)
    # The overlay's colours are bright; on white paper they are drawn darker.
    return red / 255 * 0.85, green / 255 * 0.85, blue / 255 * 0.85


def _size(data: StreamData) -> tuple[int, int]:
    if data.size is None:
        raise UsageError(f"stream {data.stream_id!r} has no objects on frames {data.first} to {data.last}")
    return data.size
