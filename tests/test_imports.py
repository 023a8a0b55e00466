"""Who may import whom: read from the sources, so that no import has to run."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("xmem_core", "pipeline", "jobs")
FILES = sorted(p.relative_to(ROOT).as_posix() for package in PACKAGES for p in (ROOT / package).rglob("*.py"))

# The three that design.md names, and what was split off sources.py and rtsp.py.
MAY_IMPORT_AV = {
    "pipeline/video/sources.py",
    "pipeline/live/camera/source.py",
    "pipeline/draw/video.py",
    "pipeline/video/decoding.py",
    "pipeline/video/packet_index.py",
    "pipeline/live/camera/connection.py",
    "pipeline/live/camera/access_units.py",
}
MAY_IMPORT_RAY = (
    "pipeline/distributed/actors.py",
    "pipeline/distributed/serve.py",
    "pipeline/replica_",
    "jobs/",
)
MAY_NOT_IMPORT = {"xmem_core": {"pipeline", "jobs"}, "pipeline": {"jobs"}, "jobs": set[str]()}
CORE = {"xmem_core", "torch", "numpy", "safetensors"}
TRAINING_TOO = {"cv2"}
TRAINING_LAZILY = {"matplotlib"}


def imported(source: str) -> Iterator[tuple[str, bool]]:
    """Top-level package of every import, and whether it is run only when a function is."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name.split(".")[0], lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                yield ("." * child.level if child.level else (child.module or "").split(".")[0], lazy)
            elif isinstance(child, ast.Call) and ast.unparse(child.func) in (
                "importlib.import_module",
                "import_module",
                "__import__",
            ):
                name = child.args[0] if child.args else None
                if isinstance(name, ast.JoinedStr) and name.values:  # f"package.{module}"
                    name = name.values[0]
                text = name.value if isinstance(name, ast.Constant) else ""
                yield (text.split(".")[0] if isinstance(text, str) and "." in text else text or "?", lazy)
            yield from walk(child, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    return walk(ast.parse(source), False)


def of(file: str) -> set[tuple[str, bool]]:
    return set(imported((ROOT / file).read_text(encoding="utf-8")))


def names(file: str) -> set[str]:
    return {name for name, _ in of(file)}


def test_the_walk_sees_every_kind_of_import() -> None:
    source = """
import a.b, c as d
from e.f import g
from . import h
def later():
    import i
    class K:
        from j import k
import_module("l.m")
import_module(f"o.{p}")
import_module(f"{q}.r")
if True:
    import n
"""
    assert set(imported(source)) == {
        ("a", False), ("c", False), ("e", False), (".", False),
        ("i", True), ("j", True), ("l", False), ("n", False), ("o", False), ("?", False),
    }  # fmt: skip


def test_there_is_something_to_walk() -> None:
    assert "xmem_core/memory.py" in FILES
    assert {"torch"} <= names("xmem_core/memory.py")
    assert any(file.startswith("pipeline/") for file in FILES)
    assert any(file.startswith("jobs/") for file in FILES)


@pytest.mark.parametrize("file", FILES)
def test_imports_go_from_jobs_to_pipeline_to_the_core_only(file: str) -> None:
    forbidden = MAY_NOT_IMPORT[file.split("/")[0]]
    assert not names(file) & forbidden


@pytest.mark.parametrize("file", FILES)
def test_only_some_import_av_and_ray(file: str) -> None:
    if file not in MAY_IMPORT_AV:
        assert "av" not in names(file)
    if not file.startswith(MAY_IMPORT_RAY):
        assert "ray" not in names(file)


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("xmem_core/")])
def test_the_core_imports_little(file: str) -> None:
    training = file.startswith("xmem_core/training/")
    allowed = CORE | (TRAINING_TOO if training else set())
    for name, lazy in of(file):
        if name in sys.stdlib_module_names:
            continue
        assert name in allowed or (training and lazy and name in TRAINING_LAZILY), (name, lazy)


@pytest.mark.parametrize("file", FILES)
def test_imports_are_absolute(file: str) -> None:
    assert not any(name.startswith(".") for name in names(file))
