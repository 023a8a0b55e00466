"""Fake tracker actor for scheduling tests, with the actor's methods but no tracking.

A video's behaviour is given in its URI, `standin://?chunks=5&kill=2`:

- chunks: number of chunks. ms: time per chunk.
- kill, fail, boom: the chunk at which the process dies, the chunk fails, or the method raises.
- once: only the first time.
- meet: its chunks wait until this many workers have been started.
- bad: opening it fails; bad=permanent: permanently.

Chunks are committed as files that are created and never overwritten, so a chunk that is tracked twice is
detected.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import ray

from pipeline.base.errors import UsageError
from pipeline.base.records import FrameChunk
from pipeline.distributed.messages import ChunkReport, StreamSpec, StreamStatus
from pipeline.storage.failures import Failure

CHUNK = 10


class StandIn:
    """Fake tracker whose streams behave as specified in their URIs."""

    def __init__(self, folder: str, fails: str | None = None) -> None:
        if fails == "usage":
            raise UsageError("there is no model 'x': give another one")
        if fails is not None:
            raise RuntimeError(fails)
        self.folder = Path(folder)
        self.streams: dict[str, tuple[dict[str, str], int]] = {}
        (self.folder / f"worker-{os.getpid()}").touch()

    def facts(self) -> dict[str, Any]:
        node = ray.get_runtime_context().get_node_id()
        return {"pid": os.getpid(), "node_id": node, "device_bytes": 1000}

    def open(self, spec: StreamSpec, state: bytes | None = None) -> StreamStatus:
        traits = dict(parse_qsl(spec.uri.partition("?")[2]))
        self.note("open", spec.stream_id)
        if "bad" in traits:
            return StreamStatus(
                spec.stream_id, failure=Failure("SourceError", "no video", traits["bad"] == "permanent")
            )
        done = committed(self.folder, spec.stream_id)
        total = int(traits["chunks"])
        status = StreamStatus(
            spec.stream_id,
            next_frame=done * CHUNK,
            rows=done,
            finished=done >= total,
            frame_count=total * CHUNK,
            state_bytes=10,
        )
        if not status.finished:
            self.streams[spec.stream_id] = (traits, done)
        return status

    def track_many(self, refs: Sequence[FrameChunk]) -> list[ChunkReport]:
        self.note("together", " ".join(ref.stream_id for ref in refs))
        return [self.track(ref) for ref in refs]

    def track(self, ref: FrameChunk) -> ChunkReport:
        if ref.stream_id not in self.streams:
            return ChunkReport(ref.stream_id, "unknown")
        traits, done = self.streams[ref.stream_id]
        if ref.first != done * CHUNK:
            return ChunkReport(ref.stream_id, "refused", next_frame=done * CHUNK)
        self.note("track", ref.stream_id)
        time.sleep(float(traits.get("ms", 0)) / 1000)
        while len(list(self.folder.glob("worker-*"))) < int(traits.get("meet", 0)):
            time.sleep(0.05)
        if self.strikes("kill", ref.stream_id, traits, done):
            os._exit(1)
        if self.strikes("boom", ref.stream_id, traits, done):
            raise KeyError(f"boom at {done} with https://user:secret@host/")
        if self.strikes("fail", ref.stream_id, traits, done):
            del self.streams[ref.stream_id]
            failure = Failure("SourceError", f"cannot decode chunk {done}", False)
            return ChunkReport(ref.stream_id, "failed", next_frame=done * CHUNK, rows=done, failure=failure)
        path = self.folder / ref.stream_id / f"{done:06d}"
        path.parent.mkdir(exist_ok=True)
        try:
            path.open("x").close()
        except FileExistsError:
            self.note("twice", f"{ref.stream_id} {done}")
        done += 1
        self.streams[ref.stream_id] = (traits, done)
        if done < int(traits["chunks"]):
            return ChunkReport(ref.stream_id, "tracked", next_frame=done * CHUNK, frames=CHUNK, rows=done)
        del self.streams[ref.stream_id]
        return ChunkReport(ref.stream_id, "finished", next_frame=done * CHUNK, frames=CHUNK, rows=done)

    def release(self, stream_id: str, to_store: bool = True) -> bytes | None:
        self.note("release", stream_id)
        self.streams.pop(stream_id, None)
        return None

    def close(self, stream_id: str) -> None:
        self.note("close", stream_id)
        self.streams.pop(stream_id, None)

    def strikes(self, trait: str, name: str, traits: dict[str, str], done: int) -> bool:
        if traits.get(trait) != str(done):
            return False
        before = self.folder / f"struck-{trait}-{name}"
        if "once" in traits and before.exists():
            return False
        before.touch()
        return True

    def note(self, kind: str, what: str) -> None:
        with open(self.folder / "notes.jsonl", "a") as file:
            file.write(json.dumps([kind, what, os.getpid()]) + "\n")


def committed(folder: Path, name: str) -> int:
    there = folder / name
    return len(list(there.iterdir())) if there.is_dir() else 0


def notes(folder: Path, kind: str) -> list[str]:
    path = folder / "notes.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [what for k, what, _ in map(json.loads, lines) if k == kind]


Actor: Any = ray.remote(max_restarts=-1, max_task_retries=0)(StandIn)
