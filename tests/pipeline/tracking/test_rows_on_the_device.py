"""Rows made of runs that are found where the planes are, as on a GPU: the bytes of rows of the label map."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.prompted import three_objects
from support.tiny import CAPPED_MEMORY
from support.videos import make_video
from support.written import files

from pipeline.base.records import Frame
from pipeline.prompts.resolving import PromptSet
from pipeline.tracking import objects
from pipeline.tracking.files.track import track
from pipeline.tracks.masks import tracked_records
from xmem_core import StepResult, segmenter
from xmem_core.presence import PresenceConstants

FRAMES = 22
PRESENCE = PresenceConstants((1.0, 0.5, 0.2, 0.7, -0.3, 0.1), -1.0)


class OnDevice(StepResult):
    """A result on a CPU that is read as on a GPU: the label map and the probabilities stay where they are."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.finds_runs = True


def planes(objects: int, height: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, objects + 1, 5, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    noise = torch.randn(1, objects + 1, height, width, generator=generator)
    return torch.softmax(3 * smooth + 0.3 * noise, 1)[0]


@pytest.mark.parametrize("size", [(48, 64), (71, 90), (37, 41)])
@pytest.mark.parametrize("constants", [None, PRESENCE])
@pytest.mark.parametrize("count", [1, 4, 12])
def test_records_are_equal(size: tuple[int, int], constants: PresenceConstants | None, count: int) -> None:
    ids = tuple(3 * k + 2 for k in range(count))
    for seed in range(4):
        probabilities = planes(count, 48, 64, seed)
        if seed == 0:
            probabilities[2 % (count + 1)] = 0  # one is nowhere, or of one object all is foreground
        frame = Frame(np.zeros((*size, 3), np.uint8), 7, 0.28, None)
        plain, runs = (
            tracked_records(kind(ids, size, probabilities, constants), None, frame, {2: "cat"})
            for kind in (StepResult, OnDevice)
        )
        assert plain == runs
        assert [record.object_id for record in runs] == list(ids)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_video(tmp_path_factory.mktemp("video") / "clip.mkv", FRAMES, width=158, height=122, gop=8)


@pytest.mark.parametrize("detector", [None, "motion"])
def test_files_of_a_stream_are_equal(
    detector: str | None, tmp_path: Path, video: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[str] = set()

    def noted(*given: Any) -> Any:
        threads.add(threading.current_thread().name)
        return tracked_records(*given)

    written = []
    for name, kind in (("plain", StepResult), ("device", OnDevice)):
        with monkeypatch.context() as patch:
            patch.setattr(segmenter, "StepResult", kind)
            if kind is OnDevice:
                patch.setattr(objects, "tracked_records", noted)
            track(
                str(video),
                tmp_path / name,
                stream_id="cam",
                model=model,
                threads=1,
                dtype="float32",
                chunk_frames=5,
                memory=CAPPED_MEMORY,
                detector=detector,
                prompts=PromptSet.from_record(three_objects(correct_at=11)),
            )
        written.append(files(tmp_path / name, "tracks"))
    assert written[0] == written[1]
    assert len(written[0]) == 5
    # While the next frame is tracked, unless the detector needs the labels first.
    assert threads == {"MainThread" if detector else "xmem-rows_0"}
