"""Which chunk files a scan reads by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pipeline.analytics.scan.dataset import ChunkDataset


def opened_chunks(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Note them from now on; returns what gives those since it was last asked, as `stream/first frame`."""
    names: list[str] = []
    read = ChunkDataset._read_all

    def note(self: ChunkDataset, chunks: Any, *arguments: Any) -> Any:
        names.extend(f"{chunk.stream_id}/{chunk.first}" for chunk in chunks)
        return read(self, chunks, *arguments)

    monkeypatch.setattr(ChunkDataset, "_read_all", note)

    def since() -> list[str]:
        found = sorted(names)
        names.clear()
        return found

    return since
