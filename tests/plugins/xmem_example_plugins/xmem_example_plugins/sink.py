"""Sink that writes one JSON file per range into the folder named by XMEM_JSON_FILES."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa


class JsonFiles:
    """Replaces the rows of a repeated range, and removes a stream that is started over."""

    def __init__(self) -> None:
        self._folder = Path(os.environ["XMEM_JSON_FILES"])

    def commit(self, stream_id: str, first: int, last: int, tracks: pa.Table, events: pa.Table) -> None:
        folder = self._folder / stream_id
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"tracks": tracks.to_pylist(), "events": events.to_pylist()}, default=str)
        new = folder / f"{first:012d}-{last:012d}.json"
        part = new.with_suffix(".part")
        part.write_text(text)
        for old in self._files(stream_id):
            begins, ends = (int(part) for part in old.stem.split("-"))
            if old != new and (first == 0 or (begins <= last and first <= ends)):
                old.unlink()
        part.replace(new)  # atomic, and the last step: after a crash before it, commit is called again

    def read(self, stream_id: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the stored rows of a stream, for the conformance check."""
        ranges = [json.loads(path.read_text()) for path in self._files(stream_id)]
        tracks = [_without_time(row) for held in ranges for row in held["tracks"]]
        return tracks, [_without_time(row) for held in ranges for row in held["events"]]

    def _files(self, stream_id: str) -> list[Path]:
        return sorted((self._folder / stream_id).glob("*.json"))


def _without_time(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "wall_time"}  # JSON has it as text
