"""The detector onnx:FILE, on tiny networks of each family: boxes, classes, and errors in one line."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto
from support.onnx_models import (
    FAMILIES,
    NAMES,
    SIDE,
    STRETCHED,
    constant_of,
    model_of,
    picture,
    ultralytics_metadata,
    with_metadata,
)

from pipeline.base.errors import UsageError
from pipeline.base.records import Frame
from pipeline.detect.loading import load_detector
from pipeline.detect.onnx_detector import OnnxDetector, OnnxSettings
from pipeline.detect.protocol import Detection
from pipeline.testing.detectors import check_detector

FLOAT, DOUBLE = TensorProto.FLOAT, TensorProto.DOUBLE
# Half of it, at even pixels, fits the input exactly.
WIDE = picture(96, 256, red=(20, 24, 40, 60), green=(200, 8, 30, 20), blue=(120, 60, 16, 36))
BOXES = {"red": (20, 24, 40, 60), "green": (200, 8, 30, 20), "blue": (120, 60, 16, 36)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Path of the network of a family."""
    folder = tmp_path_factory.mktemp("models")

    def path_of(family: str) -> str:
        path = folder / f"{family}.onnx"
        return str(path if path.exists() else model_of(family, path))

    return path_of


def frame_of(image: np.ndarray, index: int = 0) -> Frame:
    return Frame(image, index, None)


def by_class(found: list[Detection]) -> dict[str | None, tuple[int, ...]]:
    classes = [each.category for each in found]
    assert len(set(classes)) == len(classes), f"found twice: {found}"
    return {each.category: each.bounds for each in found}


@pytest.mark.parametrize("family", FAMILIES)
def test_boxes_and_classes_of_each_family(family: str, model: Callable[[str], str]) -> None:
    detector = load_detector("onnx:" + model(family))
    found = detector.detect(frame_of(WIDE))
    boxes = by_class(found)
    assert set(boxes) == set(NAMES)
    # Where the picture is stretched, edges are blurred.
    slack = 2 if family in STRETCHED else 0
    for name, expected in BOXES.items():
        assert np.abs(np.subtract(boxes[name], expected)).max() <= slack, (name, boxes[name])
    assert all(0.8 < each.score <= 0.91 for each in found)
    assert detector.detect(frame_of(np.full((96, 256, 3), 128, np.uint8))) == []


@pytest.mark.parametrize("size", [(256, 96), (128, 128), (33, 500), (64, 40)])
def test_boxes_come_back_from_frames_of_any_shape(size: tuple[int, int], model: Callable[[str], str]) -> None:
    height, width = size
    box = (width // 4, height // 4, width // 2, height // 2)
    ratio = SIDE / max(size)  # of the letterboxed picture
    for family in ("yolov8", "yolox"):
        (found,) = load_detector("onnx:" + model(family)).detect(frame_of(picture(height, width, red=box)))
        assert np.abs(np.subtract(found.bounds, box)).max() <= np.ceil(1 / ratio), found


def test_it_keeps_the_promises_of_a_detector(model: Callable[[str], str]) -> None:
    frames = [frame_of(picture(96, 256, red=(4 * at, 20, 20, 30)), at) for at in range(10)]
    check_detector(lambda: load_detector("onnx:" + model("yolov8")), frames)


def test_a_model_that_takes_any_size_gets_the_one_that_it_was_made_for(tmp_path: Path) -> None:
    metadata = ultralytics_metadata(imgsz="[160, 160]")
    path = model_of("yolov8", tmp_path / "free.onnx", metadata=metadata, dynamic=True, side=160)
    found = OnnxDetector(str(path)).detect(frame_of(picture(80, 320, blue=(100, 20, 40, 40))))
    assert by_class(found) == {"blue": (100, 20, 40, 40)}


def test_pictures_in_half_precision(tmp_path: Path) -> None:
    path = model_of("yolov8", tmp_path / "half.onnx", half=True)
    assert by_class(OnnxDetector(str(path)).detect(frame_of(WIDE))) == BOXES


def test_boxes_over_the_edge_are_cut_and_weak_ones_left_out(model: Callable[[str], str]) -> None:
    detector = OnnxDetector(model("yolov8"))
    image = picture(96, 256, red=(236, 76, 20, 20))
    # The second box, a pixel beside of the input, would reach over the edge.
    (kept,) = detector.detect(frame_of(image))
    assert kept.bounds == (236, 76, 20, 20)
    all_of_them = OnnxDetector(model("yolov8"), settings=OnnxSettings(iou=1.0)).detect(frame_of(image))
    assert [(d.bounds, d.score) for d in all_of_them] == [((236, 76, 20, 20), 0.9), ((238, 78, 18, 18), 0.8)]
    assert (
        OnnxDetector(model("yolov8"), settings=OnnxSettings(least_score=0.95)).detect(frame_of(image)) == []
    )
    (one,) = OnnxDetector(model("yolov8"), settings=OnnxSettings(most=1)).detect(frame_of(WIDE))
    assert one.category == "red"


def test_names_of_a_file_beside_the_model_come_first(tmp_path: Path) -> None:
    path = model_of("yolov5", tmp_path / "net.onnx")
    (tmp_path / "net.names").write_text("rot\ngrün\nblau\n", encoding="utf-8")
    assert OnnxDetector(str(path)).categories == ("rot", "grün", "blau")
    assert set(by_class(OnnxDetector(str(path)).detect(frame_of(WIDE)))) == {"rot", "grün", "blau"}


def test_without_names_categories_are_numbers(tmp_path: Path) -> None:
    path = model_of("yolox", tmp_path / "net.onnx", metadata={})
    detector = OnnxDetector(str(path))
    assert detector.categories is None
    assert set(by_class(detector.detect(frame_of(WIDE)))) == {"0", "1", "2"}


def test_names_as_a_list(tmp_path: Path) -> None:
    path = model_of("rtdetr", tmp_path / "net.onnx", metadata={"names": '["a", "b", "c"]'})
    assert OnnxDetector(str(path)).categories == ("a", "b", "c")


def test_classes_that_the_model_does_not_have(model: Callable[[str], str]) -> None:
    name = "onnx:" + model("yolov8")
    load_detector(name, classes="red, blue")
    with pytest.raises(UsageError, match=r"has no class 'person': its classes are red, green, blue$"):
        load_detector(name, classes="red,person")
    with pytest.raises(UsageError, match="'motion' has no class 'person': its detections have no class"):
        load_detector("motion", classes="person")
    with pytest.raises(UsageError, match=r"detect_classes='red,,' is not allowed: give names"):
        load_detector(name, classes="red,,")


def test_the_state_of_another_model_is_refused(model: Callable[[str], str]) -> None:
    one, other = OnnxDetector(model("yolov8")), OnnxDetector(model("yolov5"))
    one.from_bytes(OnnxDetector(model("yolov8")).to_bytes())
    with pytest.raises(ValueError, match=r"not of a detector with the model .*yolov5\.onnx"):
        other.from_bytes(one.to_bytes())


def test_streams_of_a_process_share_the_network(model: Callable[[str], str]) -> None:
    one, other = OnnxDetector(model("yolov8")), OnnxDetector(model("yolov8"))
    assert one._network is other._network
    assert one._network is not OnnxDetector(model("yolov5"))._network


def complaint_of(path: Path) -> str:
    with pytest.raises(UsageError) as raised:
        OnnxDetector(str(path))
    assert path.stem in str(raised.value)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    assert "no such file" in complaint_of(tmp_path / "gone.onnx")
    for content in (b"", b"no model at all", bytes(range(256)) * 4):
        (tmp_path / "text.onnx").write_bytes(content)
        assert "is no ONNX model that onnxruntime can load" in complaint_of(tmp_path / "text.onnx")
    whole = model_of("yolov8", tmp_path / "whole.onnx").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    assert "is no ONNX model that onnxruntime can load" in complaint_of(tmp_path / "cut.onnx")
    with pytest.raises(UsageError, match=r"'onnx:' names no file: give onnx:FILE"):
        load_detector("onnx:")


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((1, 1000), "outputs output0 1 x 1000 are of no known family; known are exports of YOLOv5"),
        ((1, 300, 91), "outputs output0 1 x 300 x 91 are of no known family"),
        ((1, 1, 32, 32), "outputs output0 1 x 1 x 32 x 32 are of no known family"),
        ((2, 300, 6), "outputs output0 2 x 300 x 6 are of no known family"),
        ((1, 336, 5 + 80), "has 80 classes, but there are 3 names: give one a line"),
        ((1, 4 + 7, 336), "has 7 classes, but there are 3 names"),
    ],
)
def test_outputs_of_no_family_and_names_that_do_not_fit(
    shape: tuple[int, ...], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(with_metadata(constant_of(shape), ultralytics_metadata()))
    assert said in complaint_of(path)


@pytest.mark.parametrize(
    ("inputs", "kind", "said"),
    [
        ([(1, 1, 128, 128)], FLOAT, "has the inputs input0 1 x 1 x 128 x 128: expected one picture"),
        ([(1, 128, 128, 3)], FLOAT, "has the inputs input0 1 x 128 x 128 x 3: expected one picture"),
        ([(1, 3, 128, 128)] * 2, FLOAT, "expected one picture of 1 x 3 x height x width"),
        ([(4, 3, 128, 128)], FLOAT, "takes batches of 4 pictures: export it for a batch of 1"),
        ([(1, 3, 8, 8)], FLOAT, "takes pictures of 8x8 pixels: sides must be from 32 to 8192"),
        ([(1, 3, 128, 128)], DOUBLE, "takes pictures as tensor(double): export it with float32"),
    ],
)
def test_inputs_that_are_no_single_picture(
    inputs: list[tuple[int, ...]], kind: int, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(constant_of((1, 300, 6), *inputs, kind=kind))
    assert said in complaint_of(path)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"names": "{0: 'a', 2: 'b', 3: 'c'}"}, "numbers are not 0, 1, 2"),
        ({"names": "__import__('os')"}, "class names of the metadata cannot be read"),
        ({"names": "['a', '', 'c']"}, "a class name is empty"),
        ({"names": "{0: 'person'}"}, "has 3 classes, but there are 1 names"),
        ({"names": "{0: 'a', 1: 'b', 2: 'c'}", "task": "segment"}, "is a model for the task 'segment'"),
    ],
)
def test_metadata_that_do_not_fit(metadata: dict[str, str], said: str, tmp_path: Path) -> None:
    assert said in complaint_of(model_of("yolov5", tmp_path / "net.onnx", metadata=metadata))


def test_names_files_that_do_not_fit(tmp_path: Path) -> None:
    path = model_of("yolov8", tmp_path / "net.onnx")
    (tmp_path / "net.names").write_text("red\ngreen\n")
    assert "has 3 classes, but there are 2 names" in complaint_of(path)
    (tmp_path / "net.names").write_text("red\n\nblue\n")
    assert "net.names: a class name is empty" in complaint_of(path).replace(str(tmp_path) + "/", "")
    (tmp_path / "net.names").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"net.names is not a text file of class names"):
        OnnxDetector(str(path))


def test_scores_that_are_no_probabilities(tmp_path: Path) -> None:
    path = model_of("yolov8", tmp_path / "logits.onnx", bias=-4.0)
    assert "scores from -4 to 0 instead of 0 to 1: export the model with its sigmoid" in complaint_of(path)


def test_a_class_beyond_the_names_is_an_error_when_it_is_found(tmp_path: Path) -> None:
    path = model_of("rtdetr", tmp_path / "net.onnx", metadata={"names": "['red', 'green']"})
    detector = OnnxDetector(str(path))
    with pytest.raises(UsageError, match=r"net.onnx returned class 2, but there are 2 names"):
        detector.detect(frame_of(WIDE))


def test_without_onnxruntime_the_error_is_the_command_that_installs_it(
    model: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model("yolo-nms")
    real = builtins.__import__

    def missing(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "onnxruntime":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UsageError, match=r"not installed: pip install 'xmem-pipeline\[onnx\]'$"):
        OnnxDetector(path)


def test_on_a_machine_without_cuda_it_runs_on_the_cpu_and_says_so(
    model: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime has CUDA here")
    detector = OnnxDetector(model("yolov8"), device="cuda:0")
    assert "runs on the CPU: onnxruntime has no CUDAExecutionProvider" in caplog.text
    assert by_class(detector.detect(frame_of(WIDE))) == BOXES
