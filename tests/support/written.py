"""Reads the files of an output folder."""

from __future__ import annotations

from pathlib import Path


def files(out: Path, *folders: str) -> dict[str, bytes]:
    """Files below these folders of `out` (default: the rows): relative path to content."""
    return {
        str(p.relative_to(out)): p.read_bytes()
        for folder in folders or ("tracks", "events")
        for p in sorted((out / folder).rglob("*"))
        if p.is_file()
    }
