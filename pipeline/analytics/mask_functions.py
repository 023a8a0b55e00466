"""SQL functions on masks, vectorised over run lengths, and the view `masks` that has them as one value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, reduce
from inspect import Parameter, Signature
from typing import Any

import cv2
import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.base.errors import UsageError
from pipeline.tracks.mask_arrays import Floats, Ints, MaskArray, Point, outline
from pipeline.zones.geometry import crossing_edges, raster_down_columns

MASK = "STRUCT(counts VARCHAR, height INTEGER, width INTEGER)"
MASKS_SQL = """
CREATE VIEW masks AS
SELECT * EXCLUDE (frame_height, frame_width, mask_rle),
       mask_from_rle(mask_rle, frame_height, frame_width) AS mask
FROM tracks
"""
_MACRO = f"""
CREATE MACRO mask_from_rle(counts, height, width) AS
CASE WHEN counts IS NOT NULL THEN {{'counts': counts, 'height': height, 'width': width}}::{MASK} END
"""
_MASK = pa.struct([("counts", pa.string()), ("height", pa.int32()), ("width", pa.int32())])
_POINT = pa.struct([("x", pa.float64()), ("y", pa.float64())])
_RINGS = pa.list_(pa.list_(pa.list_(pa.int32())))
_KEPT_RASTERS = 16

Kernel = Callable[..., pa.Array]


class MaskFunctions:
    """The functions, registered with one connection.

    Args:
        connection: gets the functions and the macro `mask_from_rle`.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self.failure: UsageError | None = None
        connection.execute(_MACRO)
        create: Any = (
            connection.create_function
        )  # its stubs have the enumerations only, whose module differs by version
        for name, (kernel, parameters, result) in _KERNELS.items():
            create(
                name,
                self._function(name, kernel, len(parameters)),
                list(parameters),
                result,
                type="arrow",
                null_handling="special",
            )

    def _function(self, name: str, kernel: Kernel, count: int) -> Callable[..., pa.Array]:
        def function(*columns: Any) -> pa.Array:
            arrays = [c.combine_chunks() if isinstance(c, pa.ChunkedArray) else c for c in columns]
            try:
                return _over_known_rows(kernel, arrays)
            except ValueError as error:
                # DuckDB passes on a text with the traceback's last line.
                self.failure = UsageError(f"query: {name}: {error}")
                raise self.failure from error

        # DuckDB counts the parameters.
        parameters = [Parameter(f"column_{i}", Parameter.POSITIONAL_ONLY) for i in range(count)]
        vars(function)["__signature__"] = Signature(parameters)
        return function


def _over_known_rows(kernel: Kernel, arrays: Sequence[pa.Array]) -> pa.Array:
    """The kernel's results for rows without a null, and nulls."""
    known = reduce(pc.and_, [_is_known(array) for array in arrays]).to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(known)
    if len(rows) == len(known):
        return kernel(*arrays)
    found = kernel(*[array.take(pa.array(rows)) for array in arrays])
    places = np.cumsum(known) - 1
    return found.take(pa.array(np.maximum(places, 0), mask=~known))


def _is_known(array: pa.Array) -> pa.Array:
    if not pa.types.is_struct(array.type):
        return array.is_valid()
    return reduce(pc.and_, [child.is_valid() for child in array.flatten()])


def _masks(column: pa.Array) -> MaskArray:
    counts, heights, widths = column.flatten()
    sizes = (side.to_numpy(zero_copy_only=False).astype(np.int64) for side in (heights, widths))
    return MaskArray.from_counts(counts.cast(pa.binary()).to_pylist(), *sizes)


def _column(masks: MaskArray) -> pa.Array:
    sizes = [pa.array(side.astype(np.int32)) for side in (masks.heights, masks.widths)]
    return pa.StructArray.from_arrays([pa.array(masks.counts(), pa.string()), *sizes], fields=list(_MASK))


def _numbers(column: pa.Array) -> NDArray[Any]:
    found: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return found


def _area(mask: pa.Array) -> pa.Array:
    return pa.array(_masks(mask).areas())


def _iou(a: pa.Array, b: pa.Array) -> pa.Array:
    return pa.array(_masks(a).ious(_masks(b)))


def _contains(mask: pa.Array, x: pa.Array, y: pa.Array) -> pa.Array:
    return pa.array(_masks(mask).contain(_numbers(x), _numbers(y)))


def _union(a: pa.Array, b: pa.Array) -> pa.Array:
    return _column(_masks(a).unions(_masks(b)))


def _crop(mask: pa.Array, *box: pa.Array) -> pa.Array:
    return _column(_masks(mask).crops(*(_numbers(side).astype(np.int64) for side in box)))


def _centroid(mask: pa.Array) -> pa.Array:
    x, y = _masks(mask).centroids()
    empty = pa.array(np.isnan(x))
    return pa.StructArray.from_arrays([pa.array(x), pa.array(y)], fields=list(_POINT), mask=empty)


def _to_png(mask: pa.Array) -> pa.Array:
    masks = _masks(mask)
    pictures = (cv2.imencode(".png", masks.mask(i).astype(np.uint8) * 255)[1] for i in range(len(masks)))
    return pa.array([picture.tobytes() for picture in pictures], pa.binary())


def _to_polygon(mask: pa.Array) -> pa.Array:
    masks = _masks(mask)
    found = []
    for i in range(len(masks)):
        left, top, pixels = masks.boxed(i)
        found.append([[[x + left, y + top] for x, y in ring] for ring in outline(pixels)])
    return pa.array(found, _RINGS)


def _in_polygon(mask: pa.Array, polygon: pa.Array) -> pa.Array:
    masks = _masks(mask)
    shares: Floats = np.zeros(len(masks))
    for points, rows in _polygons(polygon):
        for height, width in {*zip(masks.heights[rows].tolist(), masks.widths[rows].tolist(), strict=True)}:
            chosen = rows[(masks.heights[rows] == height) & (masks.widths[rows] == width)]
            some = masks.take(chosen)
            inside = some.pixels_in(_raster(points, height, width))
            shares[chosen] = inside / np.maximum(some.areas(), 1)
    return pa.array(shares)


def _polygons(column: pa.Array) -> list[tuple[tuple[Point, ...], Ints]]:
    """The distinct polygons of a column, and the rows that have each."""
    if not len(column):
        return []
    first = column[:1]
    if column.equals(pa.concat_arrays([first] * len(column))):
        return [(_points(first[0].as_py()), np.arange(len(column)))]
    rows: dict[tuple[Point, ...], list[int]] = {}
    for row, value in enumerate(column.to_pylist()):
        rows.setdefault(_points(value), []).append(row)
    return [(points, np.array(chosen)) for points, chosen in rows.items()]


def _points(value: Sequence[Sequence[float] | None]) -> tuple[Point, ...]:
    for point in value:
        if point is None or len(point) != 2 or None in point or not np.isfinite(point).all():
            raise ValueError(f"polygon has the point {point}: each is a list of two numbers, [x, y]")
    points = tuple((float(point[0]), float(point[1])) for point in value if point is not None)
    if len(points) > 1 and points[0] == points[-1]:  # a closed ring, as in GeoJSON
        points = points[:-1]
    if len(points) < 3:
        raise ValueError(f"polygon has {len(points)} corners: at least 3 are needed")
    crossing = _crossing(points)
    if crossing is not None:
        raise ValueError(
            f"polygon crosses itself: the edges from corners {crossing[0]} and {crossing[1]} "
            "(counted from 0) meet"
        )
    return points


@lru_cache(_KEPT_RASTERS)
def _crossing(points: tuple[Point, ...]) -> tuple[int, int] | None:
    return crossing_edges(points)


@lru_cache(_KEPT_RASTERS)
def _raster(points: tuple[Point, ...], height: int, width: int) -> Ints:
    return raster_down_columns(points, height, width)


_KERNELS: dict[str, tuple[Kernel, tuple[str, ...], str]] = {
    "mask_area": (_area, (MASK,), "BIGINT"),
    "mask_iou": (_iou, (MASK, MASK), "DOUBLE"),
    "mask_contains": (_contains, (MASK, "DOUBLE", "DOUBLE"), "BOOLEAN"),
    "mask_in_polygon": (_in_polygon, (MASK, "DOUBLE[][]"), "DOUBLE"),
    "mask_union": (_union, (MASK, MASK), MASK),
    "mask_crop": (_crop, (MASK, "INTEGER", "INTEGER", "INTEGER", "INTEGER"), MASK),
    "mask_centroid": (_centroid, (MASK,), "STRUCT(x DOUBLE, y DOUBLE)"),
    "mask_to_polygon": (_to_polygon, (MASK,), "INTEGER[][][]"),
    "mask_to_png": (_to_png, (MASK,), "BLOB"),
}
FUNCTIONS = tuple(_KERNELS)
