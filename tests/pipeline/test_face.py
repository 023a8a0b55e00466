"""The public face: its names, what each imports, and the alias `xmem_pipeline`."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pipeline

ROOT = Path(__file__).parents[2]
NAMES = [
    "AnotherWriterError",
    "Archive",
    "BoxSegmenter",
    "CommitSettings",
    "Detection",
    "Detector",
    "DetectorSettings",
    "Frame",
    "MaskRecord",
    "MemoryConfig",
    "MemoryReads",
    "ModelSettings",
    "PromptError",
    "PromptSet",
    "SettingsConflictError",
    "Sink",
    "Source",
    "SourceError",
    "StoreError",
    "StreamMemory",
    "StreamSummary",
    "TrackReader",
    "TrackSettings",
    "TrackVideos",
    "UsageError",
    "VideoSource",
    "XmemError",
    "ZoneSet",
    "connect",
    "edit_memory",
    "gather_prompts",
    "load_prompts",
    "load_zones",
    "memory_reads",
    "open_archive",
    "open_source",
    "open_tracks",
    "plot",
    "prompts_from_state",
    "query",
    "query_zones",
    "render",
    "stream_memory",
    "track",
    "write_thumbnails",
    "zone_views",
]


def python(program: str, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program in `cwd`, which precedes this checkout on the module path, as for `python script.py`."""
    (cwd / "program.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "program.py", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_names() -> None:
    assert sorted(pipeline.__all__) == sorted(NAMES)
    assert set(NAMES) <= set(dir(pipeline))
    for name in NAMES:
        assert getattr(pipeline, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'pipeline' has no attribute 'evaluate'"):
        pipeline.evaluate  # type: ignore[attr-defined]  # noqa: B018


def test_type_checkers_see_the_same_names() -> None:
    (block,) = (
        node
        for node in ast.parse((ROOT / "pipeline" / "__init__.py").read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    seen = {a.name: n.module for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert sorted(seen) == sorted(NAMES)
    # MemoryConfig is the core's; the settings of the pipeline use it.
    assert {n: f"pipeline.{m}" for n, m in vars(pipeline)["_MODULES"].items() if n != "MemoryConfig"} == {
        n: m for n, m in seen.items() if n != "MemoryConfig"
    }


@pytest.mark.parametrize(
    ("names", "without"),
    [
        ("", {"torch", "ray", "av", "cv2", "duckdb", "pyarrow", "numpy"}),
        ("query", {"torch", "ray", "av"}),
        ("open_archive, Archive", {"torch", "ray", "av"}),
        ("query_zones, zone_views, load_zones", {"torch", "ray", "av"}),
        ("query, connect, open_tracks, gather_prompts, PromptSet, XmemError", {"torch", "ray"}),
        ("TrackSettings, ModelSettings, MemoryConfig, CommitSettings, DetectorSettings", {"torch", "ray"}),
        ("render, Frame, Detection, Source, Sink", {"torch", "ray"}),
        ("track", {"ray"}),
    ],
)
def test_a_name_loads_what_it_needs_and_no_more(tmp_path: Path, names: str, without: set[str]) -> None:
    ask = f"from pipeline import {names}" if names else "import pipeline"
    done = python(f"{ask}\nimport sys\nprint(*sys.modules)", tmp_path)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "pipeline" in loaded
    assert not loaded & without


def shadow(folder: Path) -> None:
    """A user's own package named `pipeline`."""
    (folder / "pipeline").mkdir()
    (folder / "pipeline" / "__init__.py").write_text("MINE = True\n")
    (folder / "pipeline" / "base.py").write_text("raise RuntimeError('the wrong package')\n")


def test_xmem_pipeline_works_beside_a_users_own_pipeline(tmp_path: Path) -> None:
    shadow(tmp_path)
    assert python("import pipeline; assert pipeline.MINE", tmp_path).returncode == 0
    program = """
import sys
from xmem_pipeline import query, UsageError
import xmem_pipeline
assert "torch" not in sys.modules
try:
    query("nowhere", "select 1")
except UsageError as error:
    print(type(error).__module__)
from xmem_pipeline import track, gather_prompts
import pipeline.tracking.files.track
assert track is pipeline.tracking.files.track.track
assert sorted(xmem_pipeline.__all__) == sorted(pipeline.__all__)
assert set(xmem_pipeline.__all__) <= set(dir(xmem_pipeline))
assert not hasattr(xmem_pipeline, "evaluate")
"""
    done = python(program, tmp_path)
    assert (done.returncode, done.stdout) == (0, "pipeline.base.errors\n"), done.stderr


def test_a_users_own_pipeline_that_is_imported_already_is_an_error_that_says_so(tmp_path: Path) -> None:
    shadow(tmp_path)
    done = python("import pipeline\nimport xmem_pipeline", tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        f"ImportError: another package 'pipeline' ({tmp_path / 'pipeline' / '__init__.py'})"
    )
    assert "rename it" in last


def test_xmem_pipeline_and_pipeline_are_one(tmp_path: Path) -> None:
    for program in (
        "import pipeline, xmem_pipeline",
        "import xmem_pipeline, pipeline",
        "import pipeline.base.errors, xmem_pipeline, pipeline",
    ):
        done = python(f"{program}\nassert xmem_pipeline.XmemError is pipeline.XmemError", tmp_path)
        assert done.returncode == 0, done.stderr
