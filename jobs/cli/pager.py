"""Paging of results that are longer than the terminal."""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_LESS = "FRX"
"""Options of `less` unless LESS says otherwise: colours, and the last page stays on the terminal."""


def pager_command() -> list[str] | None:
    """The pager: $PAGER, or `less` if it is not set; None for "" and "cat", and for one that is not there."""
    if os.environ.get("TERM") == "dumb":  # without a cursor
        return None
    try:
        command = shlex.split(os.environ.get("PAGER", "less"))
    except ValueError:  # an open quote
        return None
    if not command or command[0] == "cat" or shutil.which(command[0]) is None:
        return None
    return command


class PagedText(io.TextIOBase):
    """Text for a terminal, which a pager gets as soon as there are more lines than fit.

    Args:
        terminal: where text goes that fits.
        command: the pager's, see `pager_command`.
    """

    def __init__(self, terminal: Any, command: list[str]) -> None:
        self._terminal, self._command = terminal, command
        self._columns, rows = shutil.get_terminal_size()
        self._left = rows - 1  # a line is left for the prompt
        self._waiting: list[str] = []
        self._pager: subprocess.Popen[str] | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return str(self._terminal.encoding)

    def isatty(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        """Keep or pass on text. BrokenPipeError if the pager was closed."""
        if self._pager is None:
            self._waiting.append(text)
            self._left -= sum(max(1, -(-len(line) // self._columns)) for line in _lines(text))
            if self._left < 0:
                self._start()
        else:
            assert self._pager.stdin is not None
            self._pager.stdin.write(text)
        return len(text)

    def finish(self) -> None:
        """Print what fits, or wait until the pager is closed."""
        if self._pager is None:
            self._terminal.write("".join(self._waiting))
            self._terminal.flush()
            return
        assert self._pager.stdin is not None
        with suppress(BrokenPipeError):
            self._pager.stdin.close()
        while True:
            with suppress(KeyboardInterrupt):  # Ctrl-C is for the pager
                self._pager.wait()
                return

    def _start(self) -> None:
        self._terminal.flush()
        self._pager = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=self._terminal,
            text=True,
            encoding="utf-8",
            env={"LESS": _LESS, **os.environ},
        )
        assert self._pager.stdin is not None
        self._pager.stdin.write("".join(self._waiting))
        self._waiting = []


def _lines(text: str) -> list[str]:
    """The lines that end in a text, without escape sequences."""
    return _ESCAPES.sub("", text).split("\n")[:-1]


@contextmanager
def paged(terminal: Any) -> Iterator[tuple[Any, bool]]:
    """A stream for a result, and whether more than a screen of it can be read there.

    A pager that is closed early ends the block.
    """
    command = pager_command() if terminal.isatty() else None
    if command is None:
        yield terminal, False
        return
    text = PagedText(terminal, command)
    try:
        with suppress(BrokenPipeError):
            yield text, True
    finally:
        text.finish()
