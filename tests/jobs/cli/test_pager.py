"""Results that are longer than the terminal go to a pager; the terminal is a pseudo-terminal."""

from __future__ import annotations

import os
import pty
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.chunks import NO_EVENTS, rows

from jobs.cli.app import main
from jobs.cli.pager import pager_command
from pipeline.tracks.store import StreamStore

Ask = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One stream of 500 frames with 1000 rows."""
    folder = tmp_path_factory.mktemp("pager") / "out"
    StreamStore(folder, "cam-1").commit(0, 499, rows(0, 499), NO_EVENTS)
    return folder


@pytest.fixture
def ask(out: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ask]:
    """Runs `xmem query` on a terminal of 60 columns and 12 lines: the exit code, and what appeared there."""
    for name, value in {"COLUMNS": "60", "LINES": "12", "TERM": "xterm", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    master, slave = pty.openpty()

    def run(*arguments: str) -> tuple[int, str]:
        seen: list[bytes] = []

        def drain() -> None:
            while b"\x04" not in (part := os.read(master, 1 << 16)):
                seen.append(part)
            seen.append(part.partition(b"\x04")[0])

        reader = threading.Thread(target=drain)
        reader.start()
        with os.fdopen(os.dup(slave), "w", encoding="utf-8") as terminal:
            monkeypatch.setattr("sys.stdout", terminal)
            with pytest.raises(SystemExit) as ended:
                main(["query", str(out), *arguments])
        os.write(slave, b"\x04")
        reader.join()
        assert isinstance(ended.value.code, int)
        return ended.value.code, b"".join(seen).decode().replace("\r\n", "\n")

    yield run
    os.close(slave)
    os.close(master)


def test_what_fits_is_printed(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGER", f"tee {tmp_path / 'paged'}")
    code, shown = ask("SELECT frame_index FROM tracks LIMIT 8")
    assert code == 0
    assert shown.splitlines()[-1] == "8 rows"
    assert not (tmp_path / "paged").exists()


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "lines", "last"),
    [
        (("SELECT frame_index FROM tracks LIMIT 9",), 12, "9 rows"),
        (("SELECT frame_index FROM tracks",), 1003, "1000 rows"),
        (("SELECT frame_index FROM tracks, range(3)",), 2003, "1000 of 3000 rows left out: add LIMIT"),
        (("SELECT * FROM tracks LIMIT 1",), 20, "1 row"),
        (("SELECT frame_index FROM tracks", "--format", "csv"), 1001, "499"),
        # Two lines of the terminal each.
        (("SELECT repeat('x', 100) FROM range(6)", "--format", "csv"), 7, "x" * 100),
    ],
)
def test_what_does_not_fit_is_paged(
    ask: Ask,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    lines: int,
    last: str,
) -> None:
    monkeypatch.setenv("PAGER", f"tee {tmp_path / 'paged'}")
    code, shown = ask(*arguments)
    assert code == 0
    paged = (tmp_path / "paged").read_text(encoding="utf-8")
    assert shown == paged
    assert len(paged.splitlines()) == lines
    assert paged.splitlines()[-1].startswith(last)


@pytest.mark.process
def test_a_pager_that_is_closed_early(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGER", "head -n 2")
    code, shown = ask("SELECT repeat('x', 10) AS x FROM range(200000)", "--format", "csv")
    assert (code, shown) == (0, "x\nxxxxxxxxxx\n")


@pytest.mark.parametrize("pager", ["", "cat", "no-such-pager -x", "'open quote"])
def test_without_a_pager_rows_are_left_out(ask: Ask, monkeypatch: pytest.MonkeyPatch, pager: str) -> None:
    monkeypatch.setenv("PAGER", pager)
    code, shown = ask("SELECT frame_index FROM tracks")
    assert code == 0
    assert len(shown.splitlines()) == 203
    assert shown.splitlines()[-1] == "800 of 1000 rows left out: add LIMIT, or use --format csv"


def test_an_output_file_is_not_paged(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGER", f"tee {tmp_path / 'paged'}")
    assert ask("SELECT frame_index FROM tracks", "--format", "csv", "-o", str(tmp_path / "a.csv")) == (0, "")
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 1001
    assert not (tmp_path / "paged").exists()
    monkeypatch.setenv("TERM", "dumb")
    assert pager_command() is None
