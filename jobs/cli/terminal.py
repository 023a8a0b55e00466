"""Terminal output shared by the commands: one console on stderr, one-line messages, download bars."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pipeline.base.redaction import redacted
from pipeline.tracking.model_files import find_model

SPEAK_EVERY_S = 30.0
"""Interval of progress lines where there is no terminal for a bar."""


@cache
def console() -> Console:
    """The shared console on stderr: sharing it keeps messages from breaking the progress bar."""
    return Console(stderr=True, highlight=False)


def version() -> str:
    """The installed version of this package."""
    try:
        return version_of("xmem-pipeline")
    except PackageNotFoundError:  # a checkout that is not installed, or packages uploaded to a cluster
        return "unknown (not installed)"


def say(text: str) -> None:
    """Print one line to stderr, without markup, so that brackets in paths are kept."""
    console().print(text, soft_wrap=True, markup=False)


def short_name(uri: str) -> str:
    """The last component of a path or URI, without the query."""
    return redacted(uri).split("?")[0].rstrip("/").rpartition("/")[2] or uri


def fetch_model(name: str) -> None:
    """Download a published checkpoint if it is not cached, with a progress bar.

    Raises:
        UsageError: there is no such model or file. XmemError: the download failed.
    """
    with Progress(console=console(), transient=True, disable=not console().is_terminal) as progress:
        task: TaskID | None = None

        def report(received: int, expected: int | None) -> None:
            nonlocal task
            if task is None:
                task = progress.add_task(f"downloading {name}", total=expected)
            progress.update(task, completed=received)

        find_model(name, report)


@contextmanager
def frame_bar(name: str) -> Iterator[tuple[Progress, TaskID]]:
    """Progress bar of frames, hidden where there is no terminal; its field `rate` is a string."""
    shared = console()
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=shared,
        disable=not shared.is_terminal,
    )
    with progress:
        yield progress, progress.add_task(name, total=None, rate="")
