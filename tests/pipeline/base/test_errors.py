"""One-line texts of exceptions."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pipeline.base.errors import bare_reason, one_line


@pytest.mark.parametrize(
    ("error", "full", "bare"),
    [
        (ValueError("no\n  good "), "no good", "no good"),
        (ValueError(), "ValueError", "ValueError"),
        (ValueError(" \n"), "ValueError", "ValueError"),
        (OSError("plain\ntext"), "plain text", "plain text"),
        (TimeoutError(), "TimeoutError", "TimeoutError"),
        (OSError(5, "a disk\nbroke", "/x"), "[Errno 5] a disk broke: '/x'", "a disk broke"),
        (PermissionError(13, "", "/x"), "[Errno 13] : '/x'", "PermissionError"),
    ],
)
def test_a_reason_is_one_line_with_or_without_what_it_is_of(error: Exception, full: str, bare: str) -> None:
    assert (one_line(error), bare_reason(error)) == (full, bare)


def test_what_the_system_raises_names_its_path_once(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(FileNotFoundError) as caught:
        missing.read_bytes()
    assert bare_reason(caught.value) == os.strerror(errno.ENOENT)
    assert str(missing) in one_line(caught.value)
