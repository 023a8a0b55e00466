"""Objects of one video's state are sought in the next video, without masks: `--from-state`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.small_net import SMALL_MEMORY, frame_at
from support.tiny import tiny_weights
from support.videos import make_video

from pipeline import prompts_from_state, query, track
from pipeline.base.errors import PromptError, UsageError
from pipeline.prompts.resolving import PromptSet
from pipeline.tracking.stream_record import FINISHED, StreamRecord, StreamSummary

PROMPTS: dict[str, Any] = {
    "version": 1,
    "objects": [
        {"frame": 0, "id": 1, "category": "square", "polygons": [[4, 2, 18, 2, 18, 16, 4, 16]]},
        {"frame": 4, "id": 7, "polygons": [[27, 8, 39, 8, 39, 20, 27, 20]]},
    ],
}


class Halves:
    """A clip cut in two, and the output folder in which the first half was tracked."""

    def __init__(self, folder: Path) -> None:
        self.first = str(make_video(folder / "first.mkv", [frame_at(i) for i in range(12)]))
        self.second = str(make_video(folder / "second.mkv", [frame_at(i) for i in range(12, 28)]))
        self.model = tiny_weights(folder)
        self.out = folder / "out"
        self.track(self.first, self.out, PromptSet.from_record(PROMPTS), stream_id="first")

    def track(self, video: str, out: Path, prompts: PromptSet | None, **options: Any) -> Any:
        names: dict[str, Any] = {"memory": SMALL_MEMORY, "chunk_frames": 4, "threads": 1, "model": self.model}
        return track(video, str(out), prompts, **{**names, **options})


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Halves:
    return Halves(tmp_path_factory.mktemp("halves"))


def rows(out: Path, stream: str) -> list[dict[str, Any]]:
    wanted = "select * from tracks where stream_id = "
    found: list[dict[str, Any]] = query(
        out, f"{wanted}'{stream}' order by frame_index, object_id"
    ).to_pylist()
    return found


def test_objects_are_sought_in_the_next_video_and_a_cut_changes_nothing(
    halves: Halves, tmp_path: Path
) -> None:
    prompts = prompts_from_state(halves.out)
    assert [(e.object_id, e.category) for e in prompts.at(0)] == [(1, "square"), (7, None)]
    assert PromptSet.from_record(prompts.to_record()) == prompts
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    halves.track(halves.second, whole, prompts, stream_id="second")
    halves.track(halves.second, cut, prompts, stream_id="second", max_frames=6)
    for path in (cut / "state/second").iterdir():
        path.unlink()  # all frames are repeated, from the stored copies
    gone = halves.out.rename(tmp_path / "gone")
    try:
        halves.track(halves.second, cut, None, stream_id="second")  # the record's prompts
    finally:
        gone.rename(halves.out)
    found = rows(whole, "second")
    assert rows(cut, "second") == found
    assert {(r["object_id"], r["category"]) for r in found} == {(1, "square"), (7, None)}
    assert len(found) == 2 * 16
    events = query(cut, "select object_id, reason from events where kind = 'object_added' order by 1")
    assert events.to_pylist() == [{"object_id": 1, "reason": "copy"}, {"object_id": 7, "reason": "copy"}]


def test_a_run_killed_between_its_last_snapshot_and_its_end_finishes(
    halves: Halves, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = StreamRecord.update

    def killed(record: StreamRecord, state: str, summary: StreamSummary) -> None:
        if state == FINISHED:
            raise KeyboardInterrupt
        update(record, state, summary)

    with monkeypatch.context() as patch:
        patch.setattr(StreamRecord, "update", killed)
        with pytest.raises(KeyboardInterrupt):
            halves.track(halves.first, tmp_path, PromptSet.from_record(PROMPTS), stream_id="first")
    assert (tmp_path / f"state/first/{12:012d}.safetensors").is_file()
    summary = halves.track(halves.first, tmp_path, None, stream_id="first")
    assert (summary.state, summary.frames, summary.rows) == (FINISHED, 12, 20)
    assert rows(tmp_path, "first") == rows(halves.out, "first")
    assert prompts_from_state(tmp_path).object_ids == {1, 7}


def test_a_state_and_masks_go_together_and_a_later_frame_may_begin_the_search(
    halves: Halves, tmp_path: Path
) -> None:
    entry = {"frame": 5, "id": 3, "state": {"object": 1, "out": str(halves.out)}}
    masks = {"version": 1, "objects": [{**PROMPTS["objects"][0], "id": 9}, entry]}
    halves.track(halves.second, tmp_path / "out", PromptSet.from_record(masks), stream_id="second")
    firsts = {r["object_id"]: r["frame_index"] for r in reversed(rows(tmp_path / "out", "second"))}
    assert firsts == {9: 0, 3: 5}


def test_what_cannot_be_sought_is_one_line_and_nothing_is_lost(halves: Halves, tmp_path: Path) -> None:
    prompts = prompts_from_state(halves.out)
    out = tmp_path / "out"
    other = tiny_weights(tmp_path, seed=3)
    with pytest.raises(PromptError, match=r"object 1 .* was tracked with other weights \(") as raised:
        halves.track(halves.second, out, prompts, stream_id="second", model=other)
    assert "\n" not in str(raised.value)
    with pytest.raises(PromptError, match=r"object 1 comes from another stream's state, .* track it forward"):
        halves.track(halves.second, out, prompts, stream_id="second", direction="backward")
    halves.track(halves.first, out, PromptSet.from_record(PROMPTS), stream_id="bare", keep_state=False)
    with pytest.raises(UsageError, match=r"stream 'bare' in .* has no usable snapshot: a run saves one"):
        prompts_from_state(out, "bare")
    with pytest.raises(UsageError, match="is no output folder of xmem"):
        prompts_from_state(tmp_path / "nowhere")
    # What is tracked stays if a restart names a state that cannot be read.
    copy = Path(shutil.copytree(halves.out, tmp_path / "copy"))
    shutil.rmtree(copy / "state")
    before = rows(out, "bare")
    gone = PromptSet.from_record(
        {"version": 1, "objects": [{"id": 1, "state": {"object": 1, "out": str(copy)}}]}
    )
    with pytest.raises(PromptError, match=r"object 1 in .* cannot be copied: .* has no usable snapshot"):
        halves.track(halves.first, out, gone, stream_id="bare", restart=True)
    assert rows(out, "bare") == before


def test_the_command_finds_objects_from_a_state(
    halves: Halves, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    memory = [
        text
        for name in ("mem_every", "top_k", "min_mid_term_frames", "max_mid_term_frames", "num_prototypes")
        for text in (f"--{name.replace('_', '-')}", getattr(SMALL_MEMORY, name))
    ]
    command = [
        "track",
        halves.second,
        "--out",
        tmp_path,
        "--model",
        halves.model,
        "--stream-id",
        "b",
        *memory,
    ]
    code, _, err = call(*command, "--from-state", halves.out, "--from-stream", "first", "--threads", "1")
    assert code == 0, err
    assert {r["object_id"] for r in rows(tmp_path, "b")} == {1, 7}
    code, _, err = call(*command, "--from-stream", "first")
    assert (code, "--from-stream goes with --from-state FOLDER" in err) == (2, True)
