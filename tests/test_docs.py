"""The documents' links, paths, command options and imports are valid."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
from test_imports import ROOMS

from jobs.cli.app import app

ROOT = Path(__file__).parents[1]
ARCHITECTURE = ROOT / "ARCHITECTURE.md"
GUIDES = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "examples/README.md")]
PAGES += GUIDES
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")
# Of other programs, in text about these.
FOREIGN = {"--all-files", "--help"}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def anchors(page: Path) -> set[str]:
    """Anchors as GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pages
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = FENCED.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name} links to {target}, which is not there"
        assert not anchor or anchor in anchors(found), f"{page.name} links to {target}: no such heading"


@pages
def test_paths_exist(page: Path) -> None:
    """Paths in code spans that begin with a folder of this repository."""
    folders = ("xmem_core", "pipeline", "jobs", "infra", "tests", "examples", "docs")
    for span in re.findall(r"`([^`\n]+)`", FENCED.sub("", page.read_text())):
        path = span.split()[0]
        if path.split("/")[0] in folders and "/" in path and not set(path) & set("*<>{|"):
            assert (ROOT / path).exists(), f"{page.name} names {path}, which is not there"


@pages
def test_python_imports_what_there_is(page: Path) -> None:
    for language, code in FENCED.findall(page.read_text()):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("pipeline", "jobs"):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{page.name}: {node.module} has no {alias.name}"


def test_the_rooms_are_those_of_the_rule() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \|[^|]*\|([^|]*)\|$", ARCHITECTURE.read_text(), re.MULTILINE)
    assert {room: tuple(re.findall(r"`([\w.]+)`", uses)) for room, uses in rows} == ROOMS


def test_classes_and_functions_of_the_architecture_exist() -> None:
    sources = "\n".join(
        path.read_text()
        for folder in ("xmem_core", "pipeline", "jobs")
        for path in (ROOT / folder).rglob("*.py")
    )
    text = FENCED.sub("", ARCHITECTURE.read_text())
    names = set(re.findall(r"`((?:[A-Z]\w+)(?:\.\w+)?)`", text)) - {"PATCH"}
    assert len(names) > 20
    for name in names:
        owner, _, method = name.partition(".")
        assert re.search(rf"^class {owner}\b", sources, re.MULTILINE), f"there is no class {owner}"
        assert not method or re.search(rf"^    def {method}\b", sources, re.MULTILINE), f"there is no {name}"


def commands() -> dict[tuple[str, ...], set[str]]:
    """The options of each command, by its words."""

    def walk(command: object, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], set[str]]]:
        options = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}  # type: ignore[attr-defined]
        yield words, {o for o in options if o.startswith("-")} | {"--help", "--debug"}
        for name, child in getattr(command, "commands", {}).items():
            yield from walk(child, (*words, name))

    return dict(walk(typer.main.get_command(app), ()))


COMMANDS = commands()
ALL_OPTIONS = set().union(*COMMANDS.values())


def lines(page: Path) -> Iterator[list[str]]:
    """The words of each `xmem` command in its blocks and code spans."""
    text = page.read_text()
    shown = [
        line for language, code in FENCED.findall(text) if language != "python" for line in code.splitlines()
    ]
    shown += re.findall(r"`([^`\n]+)`", FENCED.sub("", text))
    for line in shown:
        for part in line.removeprefix("$ ").split("; "):
            if part.startswith("xmem "):
                yield shlex.split(part, comments=True)[1:]


@pages
def test_commands_have_the_options_that_are_shown(page: Path) -> None:
    for words in lines(page):
        command: tuple[str, ...] = ()
        while len(words) > len(command) and (*command, words[len(command)]) in COMMANDS:
            command = (*command, words[len(command)])
        if command == ("batch",):
            command = ("batch", "run")  # `xmem batch VIDEOS` is short for it
        assert command or words[0].startswith("-"), (
            f"{page.name} shows `xmem {' '.join(words)}`: no such command"
        )
        for word in words[len(command) :]:
            name = word.partition("=")[0]
            if re.fullmatch(r"--?[a-z][a-z-]*", name):
                assert name in COMMANDS[command], f"{page.name}: `xmem {' '.join(command)}` has no {name}"


@pytest.mark.parametrize("page", [ROOT / "README.md", *GUIDES], ids=lambda page: page.name)
def test_options_in_text_exist(page: Path) -> None:
    spans = re.findall(r"`([^`\n]+)`", FENCED.sub("", page.read_text()))
    named = {option for span in spans for option in OPTION.findall(span)}
    assert named - FOREIGN <= ALL_OPTIONS


def test_the_guides_show_commands() -> None:
    """Otherwise the tests above would check nothing."""
    shown = [words[0] for page in PAGES for words in lines(page)]
    assert {"track", "batch", "serve", "query", "render", "evaluate"} <= set(shown)
