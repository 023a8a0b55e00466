"""Tiny ONNX files with the inputs and outputs of exported detection networks.

Each finds rectangles of pure red, green and blue, at most one of each, by the pixels of its input. A test
thus sees whether the picture arrives as the family expects it (colours, range, place), and whether boxes come
back to where the rectangles are.
"""

from __future__ import annotations

import io
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import torch
from torch import Tensor, nn

NAMES = ("red", "green", "blue")
SIDE = 128
"""Height and width of the networks' inputs."""
QUERIES = 300
_COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
_STRIDES = (8, 16, 32)

FAMILIES = (
    "yolov5",
    "yolov8",
    "yolo-nms",
    "yolox",
    "yolox-decoded",
    "rtdetr",
    "rtdetr-ultralytics",
    "rtdetr-transformers",
)
STRETCHED = ("rtdetr", "rtdetr-ultralytics", "rtdetr-transformers")
"""Families that see pictures stretched to the input's size."""


def picture(height: int, width: int, **boxes: tuple[int, int, int, int]) -> np.ndarray:
    """Grey H x W x 3 with rectangles x, y, w, h by colour."""
    image = np.full((height, width, 3), 128, np.uint8)
    for name, (x, y, w, h) in boxes.items():
        image[y : y + h, x : x + w] = _COLOURS[name]
    return image


class _Rectangles(nn.Module):
    """Corners of the three rectangles, 3 x 4 in pixels, and whether they are there, 3; from RGB 0..1."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        corners, there = [], []
        for at in range(3):
            own, others = image[0, at], image[0, [i for i in range(3) if i != at]]
            inside = ((own > 0.75) & (own < 1.1) & (others[0] < 0.3) & (others[1] < 0.3)).float()
            spans = []
            for axis in (0, 1):  # columns, then rows
                hit = inside.amax(axis)
                index = torch.arange(hit.shape[0], dtype=torch.float32)
                low = (index * hit + 10_000 * (1 - hit)).amin()
                high = ((index + 1) * hit).amax()
                spans.append((low, high))
            present = inside.amax()
            box = torch.stack([spans[0][0], spans[1][0], spans[0][1], spans[1][1]])
            corners.append(box * present)
            there.append(present)
        return torch.stack(corners), torch.stack(there)


class _Network(nn.Module):
    def __init__(self, family: str, side: int, bias: float) -> None:
        super().__init__()
        self.family, self.side, self.bias = family, side, bias
        self.rectangles = _Rectangles()

    def forward(self, image: Tensor, sizes: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        image = image.float()
        plain = self.family.startswith("yolox")
        corners, there = self.rectangles(image.flip(1) / 255 if plain else image)
        # Twice: what is found again, a pixel beside, has to be suppressed where the network does not do it.
        if self.family in ("yolov5", "yolov8") or plain:
            corners, there = torch.cat([corners, corners + 1]), torch.cat([there * 0.9, there * 0.8])
            classes = torch.eye(3).repeat(2, 1)
        else:
            there, classes = there * 0.9, torch.eye(3)
        centred = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1)
        return self._packed(corners, centred, there[:, None], classes, sizes)

    def _packed(
        self, corners: Tensor, centred: Tensor, there: Tensor, classes: Tensor, sizes: Tensor | None
    ) -> Tensor | tuple[Tensor, ...]:
        cells = [(self.side // stride) ** 2 for stride in _STRIDES]
        if self.family == "yolov5":
            rows = torch.cat([centred, there, classes.expand(6, 3) + self.bias], 1)
            return _filled(rows, 3 * sum(cells))[None]
        if self.family == "yolov8":
            rows = torch.cat([centred, there * classes + self.bias], 1)
            return _filled(rows, sum(cells)).T[None]
        if self.family.startswith("yolox"):
            grid, stride = _grid(self.side)
            background = torch.cat([(grid + 0.5) * stride, stride.expand(-1, 2)], 1)
            boxes = torch.cat([centred.clamp(min=1e-3), background[6:]])
            if self.family == "yolox":
                boxes = torch.cat([boxes[:, :2] / stride - grid, torch.log(boxes[:, 2:] / stride)], 1)
            scores = _filled(torch.cat([there, classes.expand(6, 3)], 1), sum(cells))
            return torch.cat([boxes, scores], 1)[None]
        number = torch.arange(3)[:, None]
        if self.family == "yolo-nms":
            return _filled(torch.cat([corners, there, number.float()], 1), QUERIES)[None]
        if self.family == "rtdetr-ultralytics":
            return _filled(torch.cat([centred / self.side, there * classes], 1), QUERIES)[None]
        if self.family == "rtdetr-transformers":
            logits = torch.logit((there * classes).clamp(1e-4, 1 - 1e-4))
            filled = torch.cat([logits, logits.new_full((QUERIES - 3, 3), -9.0)])
            return filled[None], _filled(centred / self.side, QUERIES)[None]
        assert sizes is not None
        scale = torch.cat([sizes, sizes], 1).float()
        boxes = _filled(corners / self.side * scale, QUERIES)
        return _filled(number, QUERIES).T, boxes[None], _filled(there, QUERIES).T


def _filled(rows: Tensor, count: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(count - rows.shape[0], rows.shape[1])])


def _grid(side: int) -> tuple[Tensor, Tensor]:
    """Column and row of each cell, N x 2, and its stride, N x 1."""
    grids, strides = [], []
    for stride in _STRIDES:
        row, column = np.mgrid[: side // stride, : side // stride]
        grids.append(np.stack([column.ravel(), row.ravel()], 1))
        strides.append(np.full((row.size, 1), stride))
    return torch.from_numpy(np.concatenate(grids)).float(), torch.from_numpy(np.concatenate(strides)).float()


def with_metadata(content: bytes, metadata: dict[str, str]) -> bytes:
    """A model with metadata, as exporters write them."""
    model = onnx.load_from_string(content)
    for key, value in metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    written: bytes = model.SerializeToString()
    return written


def exported(
    network: nn.Module,
    inputs: tuple[Tensor, ...],
    *,
    outputs: tuple[str, ...] = ("output0",),
    dynamic: bool = False,
) -> bytes:
    """A torch module as ONNX.

    Args:
        inputs: examples, the picture first.
        dynamic: height and width of the picture are free.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # The exporter that needs no further package. Constants of the trace are what is meant here.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.eval(),
            inputs,
            buffer,  # type: ignore[arg-type]
            dynamo=False,
            opset_version=17,
            input_names=["images", "orig_target_sizes"][: len(inputs)],
            output_names=list(outputs),
            dynamic_axes={"images": {2: "height", 3: "width"}} if dynamic else None,
        )
    return buffer.getvalue()


def constant_of(
    shape: tuple[int, ...], *inputs: tuple[int, ...], kind: int = onnx.TensorProto.FLOAT
) -> bytes:
    """A model that returns zeros of a shape, whatever it gets.

    Args:
        inputs: shapes of the inputs; by default one picture.
        kind: ONNX type of the inputs.
    """
    shapes = inputs or ((1, 3, SIDE, SIDE),)
    given = [onnx.helper.make_tensor_value_info(f"input{at}", kind, each) for at, each in enumerate(shapes)]
    zeros = onnx.numpy_helper.from_array(np.zeros(shape, np.float32))
    node = onnx.helper.make_node("Constant", [], ["output0"], value=zeros)
    out = onnx.helper.make_tensor_value_info("output0", onnx.TensorProto.FLOAT, shape)
    graph = onnx.helper.make_graph([node], "constant", given, [out])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    content: bytes = model.SerializeToString()
    return content


def ultralytics_metadata(names: tuple[str, ...] = NAMES, **others: str) -> dict[str, str]:
    """What Ultralytics writes into its exports, as far as it is read."""
    return {"names": str(dict(enumerate(names))), "task": "detect", "stride": "32", **others}


def model_of(
    family: str,
    path: Path,
    *,
    metadata: dict[str, str] | None = None,
    dynamic: bool = False,
    side: int = SIDE,
    bias: float = 0.0,
    half: bool = False,
) -> Path:
    """Write a tiny network of a family; see the module's docstring.

    Args:
        metadata: default: names, as Ultralytics writes them.
        bias: is added to all class scores of YOLOv5 and YOLOv8.
        half: pictures are float16.
    """
    found = ultralytics_metadata() if metadata is None else metadata
    path.write_bytes(with_metadata(_model_of(family, dynamic, side, bias, half), found))
    return path


@cache
def _model_of(family: str, dynamic: bool, side: int, bias: float, half: bool) -> bytes:
    image = torch.zeros(1, 3, side, side, dtype=torch.float16 if half else torch.float32)
    inputs: tuple[Tensor, ...] = (image,)
    outputs: tuple[str, ...] = ("output0",)
    if family == "rtdetr":
        inputs, outputs = (image, torch.tensor([[side, side]])), ("labels", "boxes", "scores")
    elif family == "rtdetr-transformers":
        outputs = ("logits", "pred_boxes")
    return exported(_Network(family, side, bias), inputs, outputs=outputs, dynamic=dynamic)
