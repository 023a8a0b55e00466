"""The table of rooms: which package may import which, checked in the sources without importing them.

Each rule is a function over a checkout that returns its violations, one line each: file, line, rule. The
tests run the rules on this checkout, and on small made-up ones that break them.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("xmem_core", "pipeline", "jobs", "xmem_pipeline")

# Room: the rooms it may use directly. What they use in turn it may use too, see `allowed_rooms`.
ROOMS: dict[str, tuple[str, ...]] = {
    "xmem_core": (),
    "xmem_core.training": ("xmem_core",),
    "xmem_core.training.clicks": ("xmem_core.training",),
    "pipeline.base": ("xmem_core",),
    "pipeline.storage": ("pipeline.base",),
    "pipeline.video": ("pipeline.storage",),
    "pipeline.tracks": ("pipeline.storage",),
    "pipeline.prompts": ("pipeline.tracks", "pipeline.video"),
    "pipeline.exchange": ("pipeline.prompts",),
    "pipeline.detect": ("pipeline.prompts",),
    "pipeline.detect.lifecycle": ("pipeline.detect",),
    "pipeline.tracking.snapshots": ("pipeline.prompts",),
    "pipeline.tracking": ("pipeline.detect.lifecycle", "pipeline.tracking.snapshots"),
    "pipeline.tracking.files": ("pipeline.tracking",),
    "pipeline.zones": ("pipeline.tracks",),
    "pipeline.analytics.scan": ("pipeline.tracks",),
    "pipeline.analytics": ("pipeline.analytics.scan", "pipeline.zones"),
    "pipeline.analytics.publishing": ("pipeline.analytics.scan",),
    "pipeline.draw": ("pipeline.tracks", "pipeline.video"),
    "pipeline.plots": ("pipeline.analytics", "pipeline.draw"),
    "pipeline.live.camera": ("pipeline.video",),
    "pipeline.memory": ("pipeline.tracking.files", "pipeline.draw"),
    "pipeline.live": ("pipeline.memory", "pipeline.zones", "pipeline.live.camera"),
    "pipeline.live.hub": ("pipeline.live",),
    "pipeline.api": ("pipeline.live.hub",),
    "pipeline.annotate": ("pipeline.api", "pipeline.exchange"),
    "pipeline.distributed": ("pipeline.api",),
    "pipeline.testing": ("pipeline.tracking",),
    # The public face. It resolves its names lazily and may name every room.
    "pipeline": ("pipeline.distributed", "pipeline.plots", "pipeline.testing"),
    "xmem_pipeline": ("pipeline",),
    "jobs": ("xmem_core",),
    "jobs.scheduling": ("pipeline.distributed",),
    "jobs.cluster": ("jobs", "pipeline"),
    "jobs.batch": ("jobs.scheduling", "jobs.cluster"),
    "jobs.evaluation": ("pipeline.tracking", "pipeline.exchange"),
    "jobs.evaluation.suites": ("jobs.evaluation", "xmem_core.training.clicks"),
    "jobs.training": ("jobs.evaluation", "jobs.cluster", "xmem_core.training.clicks"),
    "jobs.cli": (
        "jobs.batch",
        "jobs.evaluation.suites",
        "jobs.training",
        "pipeline.plots",
        "pipeline.analytics.publishing",
        "pipeline.exchange",
        "pipeline.annotate",
    ),
}

MAY_IMPORT_AV = ("pipeline.video", "pipeline.live.camera", "pipeline.draw")
MAY_IMPORT_RAY = ("pipeline.distributed", "jobs.cluster", "jobs.batch", "jobs.training", "jobs.cli")
PURE = ("jobs.scheduling",)
"""Rooms of pure logic: no threads, clocks, processes or sockets."""
IMPURE = {"threading", "multiprocessing", "subprocess", "asyncio", "socket", "time", "ray", "concurrent"}
CORE = {"xmem_core", "torch", "numpy", "safetensors"}
TRAINING_TOO = {"cv2"}
TRAINING_LAZILY = {"matplotlib"}


@dataclass(frozen=True)
class Import:
    """One imported module, by its full name; relative ones begin with a dot, unknown ones are "?".

    `lazy`: run only when a function is. `typing`: below `if TYPE_CHECKING`.
    """

    line: int
    name: str
    lazy: bool = False
    typing: bool = False

    @property
    def package(self) -> str:
        return "." if self.name.startswith(".") else self.name.split(".")[0]


@dataclass(frozen=True)
class Module:
    """A source file with what it imports."""

    path: str
    name: str
    room: str
    imports: tuple[Import, ...]


def imported(source: str) -> Iterator[Import]:
    """Every import of a source text. `from a import b` counts as a.b: b may be a module."""

    def walk(node: ast.AST, lazy: bool, typing: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(child.lineno, alias.name, lazy, typing) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                module = "." * child.level + (child.module or "")
                yield from (
                    Import(child.lineno, f"{module}.{alias.name}", lazy, typing) for alias in child.names
                )
            elif isinstance(child, ast.Call) and ast.unparse(child.func) in (
                "importlib.import_module",
                "import_module",
                "__import__",
            ):
                name = child.args[0] if child.args else None
                if isinstance(name, ast.JoinedStr) and name.values:  # f"package.{module}"
                    name = name.values[0]
                text = name.value if isinstance(name, ast.Constant) else None
                yield Import(child.lineno, text.rstrip(".") if isinstance(text, str) else "?", lazy, typing)
            checking = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk(child, lazy or later, typing or checking)

    return walk(ast.parse(source), False, False)


@cache
def modules(root: Path) -> tuple[Module, ...]:
    """All source files of the packages in a checkout."""
    found = []
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            relative = path.relative_to(root)
            name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
            imports = tuple(imported(path.read_text(encoding="utf-8")))
            found.append(Module(relative.as_posix(), name, ".".join(relative.parent.parts), imports))
    return tuple(found)


def targets(root: Path, module: Module) -> Iterator[tuple[Import, Module]]:
    """The modules of this checkout that a module imports."""
    known = {each.name: each for each in modules(root)}
    for each in module.imports:
        name = each.name
        while name and name not in known:
            name = name.rpartition(".")[0]
        if name and name != module.name:
            yield each, known[name]


def allowed_rooms(room: str) -> set[str]:
    """The rooms that a room may use, directly or through others."""
    found: set[str] = set()
    todo = [*ROOMS[room]]
    while todo:
        if (each := todo.pop()) not in found:
            found.add(each)
            todo += ROOMS[each]
    return found | {room}


def within(room: str, rooms: tuple[str, ...]) -> bool:
    return any(room == each or (each.endswith(".") and room.startswith(each)) for each in rooms)


# --- the rules -----------------------------------------------------------------------------------


def rooms_of_the_table(root: Path) -> list[str]:
    """Every package with source files is a room of the table."""
    return [
        f"{module.path}:1: {module.room} is no room: add it to ROOMS, with the rooms it may use"
        for module in modules(root)
        if module.room not in ROOMS
    ]


def imports_between_rooms(root: Path) -> list[str]:
    """A room imports only the rooms that the table allows it."""
    return [
        f"{module.path}:{each.line}: {module.room} imports {target.name}, but may use only "
        f"{', '.join(sorted(allowed_rooms(module.room) - {module.room})) or 'no other room'}"
        for module in modules(root)
        if module.room in ROOMS
        for each, target in targets(root, module)
        if target.room != module.room and target.room not in allowed_rooms(module.room)
    ]


def circles(root: Path) -> list[str]:
    """No module imports itself through others, whether at once, lazily or for types."""
    needs = {m.name: [(i, t) for i, t in targets(root, m)] for m in modules(root)}
    files = {m.name: m.path for m in modules(root)}
    done: set[str] = set()
    found: list[str] = []

    def visit(name: str, way: list[str]) -> None:
        if name in done:
            return
        for each, target in needs[name]:
            if target.name in way or target.name == name:
                circle = [*way[way.index(target.name) :], name] if target.name in way else [name]
                found.append(
                    f"{files[name]}:{each.line}: circle of imports: {' -> '.join([*circle, target.name])}"
                )
            else:
                visit(target.name, [*way, name])
        done.add(name)

    for name in needs:
        visit(name, [])
    return found


def only_some_import(package: str, rooms: tuple[str, ...]) -> Callable[[Path], list[str]]:
    """A rule: only some rooms may import a package."""

    def rule(root: Path) -> list[str]:
        return [
            f"{module.path}:{each.line}: {package} is imported by {module.room}, but only by "
            f"{', '.join(r + '*' if r.endswith('.') else r for r in rooms)}"
            for module in modules(root)
            if not within(module.room, rooms)
            for each in module.imports
            if each.package == package
        ]

    return rule


def the_core_imports_little(root: Path) -> list[str]:
    """`xmem_core` needs torch, numpy, safetensors and the standard library; its training also OpenCV."""
    found = []
    for module in modules(root):
        if not module.name.startswith("xmem_core"):
            continue
        training = module.room.startswith("xmem_core.training")
        allowed = CORE | (TRAINING_TOO if training else set())
        for each in module.imports:
            lazily = training and each.lazy and each.package in TRAINING_LAZILY
            if each.package not in allowed | sys.stdlib_module_names and not lazily:
                found.append(
                    f"{module.path}:{each.line}: {each.name} is imported by {module.room}, which may use "
                    f"{', '.join(sorted(allowed))} and the standard library"
                )
    return found


def pure_rooms(root: Path) -> list[str]:
    """Rooms of pure logic import nothing that waits, runs concurrently or reads clocks."""
    return [
        f"{module.path}:{each.line}: {each.name} is imported by {module.room}, a room of pure logic"
        for module in modules(root)
        if module.room in PURE
        for each in module.imports
        if each.package in IMPURE
    ]


def imports_are_absolute(root: Path) -> list[str]:
    """Imports use the full name of the module."""
    return [
        f"{module.path}:{each.line}: relative import {each.name}: write the whole name"
        for module in modules(root)
        for each in module.imports
        if each.package == "."
    ]


def rooms_say_what_they_are(root: Path) -> list[str]:
    """A room's __init__ has a docstring and no code; that of a package of rooms may resolve names."""
    found = []
    for module in modules(root):
        if not module.path.endswith("__init__.py"):
            continue
        body = ast.parse((root / module.path).read_text(encoding="utf-8")).body
        documented = bool(body) and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
        if not documented:
            found.append(f"{module.path}:1: the room {module.room} says in no docstring what it is for")
        if len(body) > 1 and module.room.startswith(("pipeline.", "jobs.")):
            found.append(f"{module.path}:{body[1].lineno}: code in the __init__ of the room {module.room}")
    return found


RULES: dict[str, Callable[[Path], list[str]]] = {
    "rooms_of_the_table": rooms_of_the_table,
    "imports_between_rooms": imports_between_rooms,
    "circles": circles,
    "av": only_some_import("av", MAY_IMPORT_AV),
    "ray": only_some_import("ray", MAY_IMPORT_RAY),
    "the_core_imports_little": the_core_imports_little,
    "pure_rooms": pure_rooms,
    "imports_are_absolute": imports_are_absolute,
    "rooms_say_what_they_are": rooms_say_what_they_are,
}


@pytest.mark.parametrize("rule", RULES)
def test_the_sources_keep_the_rule(rule: str) -> None:
    violations = RULES[rule](ROOT)
    assert not violations, "\n" + "\n".join(violations)


def test_the_table_has_no_circle_and_no_room_that_is_gone() -> None:
    def needs(room: str, way: tuple[str, ...]) -> None:
        assert room not in way, f"circle of rooms: {' -> '.join([*way, room])}"
        for each in ROOMS[room]:
            needs(each, (*way, room))

    for room in ROOMS:
        needs(room, ())
        assert (ROOT / room.replace(".", "/") / "__init__.py").is_file(), (
            f"{room} is in ROOMS, but is no package"
        )


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
if True:
    import n
if TYPE_CHECKING:
    from o import p
import_module(name)
import_module(f"q.{name}")
"""
    assert [(i.name, i.lazy, i.typing) for i in imported(source)] == [
        ("a.b", False, False), ("c", False, False), ("e.f.g", False, False), ("..h", False, False),
        ("i", True, False), ("j.k", True, False), ("l.m", False, False), ("n", False, False),
        ("o.p", False, True), ("?", False, False), ("q", False, False),
    ]  # fmt: skip


def test_there_is_something_to_walk() -> None:
    known = {m.name: m for m in modules(ROOT)}
    assert {"xmem_core.memory", "pipeline.tracks.store", "jobs.scheduling.scheduler"} <= set(known)
    assert "torch" in {i.package for i in known["xmem_core.memory"].imports}
    assert "ray" in {i.package for m in known.values() for i in m.imports}
    reached = {t.name for _, t in targets(ROOT, known["pipeline.tracks.store"])}
    assert "pipeline.base.errors" in reached


@pytest.mark.parametrize(
    ("rule", "path", "source", "said"),
    [
        # The rule, the file that breaks it, what is in it, what is said.
        ("rooms_of_the_table", "pipeline/attic/boxes.py", "", "pipeline.attic is no room"),
        ("imports_between_rooms", "pipeline/tracks/x.py", "\nfrom pipeline.video import y", ":2: "),
        ("imports_between_rooms", "pipeline/tracks/x.py", "def f():\n    import pipeline.video.y", ":2: "),
        ("imports_between_rooms", "xmem_core/x.py", "import pipeline.video.y", "may use only no other room"),
        ("imports_between_rooms", "pipeline/video/x.py", "import jobs.batch.y", "imports jobs.batch.y"),
        ("imports_between_rooms", "jobs/scheduling/x.py", "from jobs.batch import y", "imports jobs.batch.y"),
        ("circles", "pipeline/video/x.py", "from pipeline.video import y", "video.y -> pipeline.video.x"),
        ("av", "pipeline/tracks/x.py", "import av.error", "av is imported by pipeline.tracks"),
        ("ray", "pipeline/live/x.py", "from ray import serve", "ray is imported by pipeline.live"),
        ("the_core_imports_little", "xmem_core/x.py", "def f():\n    import cv2", ":2: cv2 is imported"),
        ("the_core_imports_little", "xmem_core/training/x.py", "import matplotlib", "matplotlib is imported"),
        ("pure_rooms", "jobs/scheduling/x.py", "import time", "time is imported by jobs.scheduling"),
        ("imports_are_absolute", "pipeline/video/x.py", "from .y import z", "relative import .y.z"),
        ("rooms_say_what_they_are", "pipeline/video/__init__.py", "", "says in no docstring"),
        ("rooms_say_what_they_are", "jobs/batch/__init__.py", '"""Batches."""\nX = 1', ":2: code in"),
    ],
)  # fmt: skip
def test_a_violation_is_found(tmp_path: Path, rule: str, path: str, source: str, said: str) -> None:
    others = {
        "pipeline/video/y.py": "from pipeline.video import x\n",
        "jobs/batch/y.py": "import av_like, rayon\n",
    }
    for name, text in {**others, path: source}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    violations = [v for v in RULES[rule](tmp_path) if v.startswith(path) or rule == "circles"]
    assert len(violations) == 1, violations
    assert said in violations[0]
