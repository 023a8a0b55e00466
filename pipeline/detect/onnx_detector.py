"""The detector `onnx:FILE`: runs an exported detection network (`pipeline.detect.onnx_outputs` has which).

Class names are those of the file FILE with the extension `.names`, one a line, where it exists, else those of
the model's metadata. Without both, categories are the numbers of the classes.
"""

from __future__ import annotations

import ast
import hashlib
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from pipeline.base.errors import SourceError, UsageError, one_line
from pipeline.base.records import Frame
from pipeline.base.redaction import shareable
from pipeline.detect.boxes import pixel_box, suppressed
from pipeline.detect.onnx_outputs import FAMILIES, Family, Outputs, Raw, Size, prepared, recognised
from pipeline.detect.protocol import Detection
from pipeline.storage.locations import locate, read_error

logger = logging.getLogger(__name__)

EXTRA = "pip install 'xmem-pipeline[onnx]'"
_MAGIC = b"xmem-onnx-detector-1\n"
_SIDE = 640  # of models that take pictures of any size, and do not say for which they were made
_SIDES = (32, 8192)
_TYPES: dict[str, type[np.floating[Any]]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class OnnxSettings:
    """Which of a network's boxes are detections.

    Args:
        least_score: detections with a smaller score are left out.
        iou: of two boxes of one class that overlap by more, the one with the smaller score is left out, where
            the network does not do it itself.
        most: maximum number of detections on a frame, those with the best scores.
    """

    least_score: float = 0.3
    iou: float = 0.5
    most: int = 300


class OnnxDetector:
    """Runs an exported network on each frame; a `Detector`.

    Args:
        uri: path or URI of the ONNX file.
        device: cpu, cuda, cuda:1, ... On a GPU, onnxruntime needs its CUDA provider; without it, the network
            runs on the CPU.

    Attributes:
        categories: names of all classes; None if the model has no names.

    Raises:
        UsageError: onnxruntime is not installed, the file is no ONNX model, is of no known family, or its
            class names do not fit.
    """

    def __init__(self, uri: str, device: str = "cpu", settings: OnnxSettings | None = None) -> None:
        self._settings = settings or OnnxSettings()
        self._network = _open(uri, device)
        self.categories = self._network.names

    def detect(self, frame: Frame) -> list[Detection]:
        """The frame's detections, best first, boxes in whole pixels and cut at the frame's edge.

        Raises:
            UsageError: the network failed, or returned a class without a name.
        """
        network, settings = self._network, self._settings
        values, placement = prepared(frame.image, network.size, network.family)
        raw = _likely(network.decoded(values), settings.least_score)
        kept = _per_class(raw, settings) if network.family.overlaps else _best_first(raw.scores)
        corners = placement.in_picture(raw.boxes)
        height, width = frame.size
        found = []
        for at in kept[: settings.most]:
            left, top, right, bottom = (float(value) for value in corners[at])
            box = pixel_box((left, top, right - left, bottom - top), width, height)
            if box is not None and right > left and bottom > top:
                score = round(min(float(raw.scores[at]), 1.0), 6)
                found.append(Detection(box=box, category=network.category(int(raw.classes[at])), score=score))
        return found

    def to_bytes(self) -> bytes:
        """A digest of the model and its names: there is no other state."""
        return _MAGIC + self._network.digest

    def from_bytes(self, blob: bytes) -> None:
        """Raises ValueError unless the bytes are of a detector with the same model and names."""
        if blob != self.to_bytes():
            raise ValueError(f"they are not of a detector with the model {self._network.uri}")


class _Network:
    """A model in onnxruntime, with what is known of it."""

    def __init__(self, uri: str, content: bytes, names: bytes | None, digest: bytes, device: str) -> None:
        self.uri, self.digest = uri, digest
        self._session, wanted = _session(uri, content, device)
        if wanted not in self._session.get_providers():
            logger.warning("%s runs on the CPU: onnxruntime has no %s; install onnxruntime-gpu", uri, wanted)
        facts = dict(self._session.get_modelmeta().custom_metadata_map)
        task = facts.get("task", "detect")
        if task != "detect":
            raise UsageError(f"{uri} is a model for the task {task!r}: export one for detection")
        self._picture, self._extra, self._type, self.size = _inputs(uri, self._session.get_inputs(), facts)
        self.names = _names_of_file(uri, names) if names is not None else _names_of_metadata(uri, facts)
        self.family = self._recognised(facts)

    def _recognised(self, facts: dict[str, str]) -> Family:
        grey = np.full((1, 3, *self.size), 114 / 255, np.float32)
        count = None if self.names is None else len(self.names)
        try:
            family = recognised(self._run(grey), self.size, count, facts.get("description", ""))
        except ValueError as error:
            raise UsageError(f"{self.uri}: {one_line(error)}") from error
        if count is not None and family.classes is not None and count != family.classes:
            raise UsageError(
                f"{self.uri} has {family.classes} classes, but there are {count} names: give one a line, in "
                f"the order of the classes, in {_names_uri(self.uri)}"
            )
        return family

    def decoded(self, values: NDArray[np.float32]) -> Raw:
        """The boxes of an input picture, 1 x 3 x h x w."""
        return self.family.decode(self._run(values), self.size)

    def category(self, number: int) -> str:
        """The name of a class."""
        if self.names is None:
            return str(number)
        if not 0 <= number < len(self.names):
            raise UsageError(
                f"{self.uri} returned class {number}, but there are {len(self.names)} names: give one for "
                f"each class, one a line, in {_names_uri(self.uri)}"
            )
        return self.names[number]

    def _run(self, values: NDArray[np.float32]) -> Outputs:
        given: dict[str, Any] = {self._picture: values.astype(self._type, copy=False)}
        if self._extra is not None:
            given[self._extra] = np.array([[self.size[1], self.size[0]]], np.int64)
        try:
            outputs = self._session.run(None, given)
        except Exception as error:
            raise UsageError(f"{self.uri}: onnxruntime cannot run it ({one_line(error)})") from error
        names = (output.name for output in self._session.get_outputs())
        return dict(zip(names, (np.asarray(output) for output in outputs), strict=True))


# Networks that are in use: streams of a process share them.
_networks: WeakValueDictionary[tuple[str, bytes, str, int], _Network] = WeakValueDictionary()
_opening = threading.Lock()


def _open(uri: str, device: str) -> _Network:
    content = _read(uri)
    assert content is not None
    names = _read(_names_uri(uri), may_be_missing=True)
    digest = hashlib.sha256(content + b"\0names\0" + (names or b"")).digest()
    with _opening:
        key = (uri, digest, device, _threads())
        network = _networks.get(key)
        if network is None:
            network = _networks[key] = _Network(uri, content, names, digest, device)
        return network


def _threads() -> int:
    """As many threads as the tracker's network has: they are set and recorded for both."""
    import torch

    return torch.get_num_threads()


def _session(uri: str, content: bytes, device: str) -> tuple[Any, str]:
    """A session, and the provider that it was meant to have. Raises UsageError."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError(
            f"detector 'onnx:{uri}' needs onnxruntime, which is not installed: {EXTRA}"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = _threads(), 1
    # Threads that wait do not take time from the tracker.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors; they are raised, too
    kind, _, number = device.partition(":")
    wanted, providers = "CPUExecutionProvider", ["CPUExecutionProvider"]
    if kind == "cuda":
        wanted = "CUDAExecutionProvider"
        if wanted in onnxruntime.get_available_providers():
            providers = [(wanted, {"device_id": int(number or 0)}), *providers]  # type: ignore[list-item]
    try:
        return onnxruntime.InferenceSession(content, options, providers=providers), wanted
    except Exception as error:
        raise UsageError(
            f"{uri} is no ONNX model that onnxruntime can load ({one_line(error)}); give the ONNX export of "
            f"a detection network ({FAMILIES}), in one file"
        ) from error


def _inputs(
    uri: str, inputs: Sequence[Any], facts: dict[str, str]
) -> tuple[str, str | None, type[np.floating[Any]], Size]:
    """Names of the picture's input and of that of its size, if there is one; the former's type and size."""
    pictures = [each for each in inputs if len(each.shape) == 4 and each.shape[1] in (3, "3")]
    others = [each for each in inputs if each not in pictures]
    sizes = [each for each in others if len(each.shape) == 2 and each.shape[1] == 2]
    if len(pictures) != 1 or len(sizes) != len(others) or len(sizes) > 1:
        shown = ", ".join(f"{each.name} {' x '.join(map(str, each.shape))}" for each in inputs)
        raise UsageError(
            f"{uri} has the inputs {shown}: expected one picture of 1 x 3 x height x width, and at most the "
            "size of the original"
        )
    (picture,) = pictures
    if picture.type not in _TYPES:
        raise UsageError(f"{uri} takes pictures as {picture.type}: export it with float32 or float16 inputs")
    batch = picture.shape[0]
    if isinstance(batch, int) and batch != 1:
        raise UsageError(f"{uri} takes batches of {batch} pictures: export it for a batch of 1")
    made_for = _made_for(facts)
    height, width = (
        given if isinstance(given, int) and given > 0 else made
        for given, made in zip(picture.shape[2:], made_for, strict=True)
    )
    least, most = _SIDES
    if not (least <= height <= most and least <= width <= most):
        raise UsageError(
            f"{uri} takes pictures of {width}x{height} pixels: sides must be from {least} to {most}"
        )
    extra = sizes[0].name if sizes else None
    return picture.name, extra, _TYPES[picture.type], (height, width)


def _made_for(facts: dict[str, str]) -> Size:
    """Height and width that metadata name, for models that take any."""
    try:
        named = ast.literal_eval(facts.get("imgsz", ""))
        sides = [int(side) for side in named] if isinstance(named, list | tuple) else [int(named)]
        return sides[0], sides[-1]
    except (ValueError, SyntaxError, TypeError, IndexError):
        return _SIDE, _SIDE


def _names_uri(uri: str) -> str:
    """The URI of the file with class names: the model's with another extension."""
    stem = uri[: -len(".onnx")] if uri.lower().endswith(".onnx") else uri
    return stem + ".names"


def _names_of_file(uri: str, content: bytes) -> tuple[str, ...]:
    try:
        lines = [line.strip() for line in content.decode("utf-8-sig").strip().splitlines()]
    except UnicodeDecodeError as error:
        raise UsageError(f"{_names_uri(uri)} is not a text file of class names: {error.reason}") from error
    return _checked_names(lines, _names_uri(uri))


def _names_of_metadata(uri: str, facts: dict[str, str]) -> tuple[str, ...] | None:
    if "names" not in facts:
        return None
    try:
        named = ast.literal_eval(facts["names"])
        if isinstance(named, dict):
            numbered = {int(number): name for number, name in named.items()}
            if set(numbered) != set(range(len(numbered))):
                raise ValueError("numbers are not 0, 1, 2, ...")
            named = [numbered[number] for number in range(len(numbered))]
        if not isinstance(named, list | tuple):
            raise ValueError("neither a list nor numbered")
    except (ValueError, SyntaxError, TypeError) as error:
        raise UsageError(
            f"{uri}: class names of the metadata cannot be read ({one_line(error)}); give them, one a line, "
            f"in {_names_uri(uri)}"
        ) from error
    return _checked_names([str(name).strip() for name in named], f"the metadata of {uri}")


def _checked_names(names: list[str], where: str) -> tuple[str, ...]:
    if not names or not all(names):
        raise UsageError(f"{where}: a class name is empty; give one a line, in the order of the classes")
    return tuple(names)


def _read(uri: str, *, may_be_missing: bool = False) -> bytes | None:
    try:
        return locate(uri).read_bytes()
    except FileNotFoundError as error:
        if may_be_missing:
            return None
        raise UsageError(f"detector 'onnx': {read_error(uri, error)}") from shareable(error)
    except SourceError as error:
        raise UsageError(f"detector 'onnx': {error}") from error
    except Exception as error:
        raise UsageError(f"detector 'onnx': {read_error(uri, error)}") from shareable(error)


def _likely(raw: Raw, least: float) -> Raw:
    sound = (raw.scores >= least) & np.isfinite(raw.boxes).all(1)
    return Raw(raw.boxes[sound], raw.scores[sound], raw.classes[sound])


def _best_first(scores: NDArray[np.float32]) -> list[int]:
    return [int(at) for at in np.argsort(-scores, kind="stable")]


def _per_class(raw: Raw, settings: OnnxSettings) -> list[int]:
    """Indices of the boxes that remain, best first, when each class is suppressed by itself."""
    kept: list[int] = []
    for number in np.unique(raw.classes):
        own = np.flatnonzero(raw.classes == number)
        kept += [int(own[at]) for at in suppressed(raw.boxes[own], raw.scores[own], settings.iou)]
    return [kept[at] for at in _best_first(raw.scores[kept])] if kept else []
