"""Decoding by torchcodec, on a CPU, against PyAV; and its absence.

torchcodec loads FFmpeg's shared libraries from the system. Those that PyAV brings have other names, so
`torchcodec_cases.py` runs in a process of its own that finds them under the usual ones.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import av
import pytest
from support.videos import make_video

from pipeline.base.errors import UsageError
from pipeline.video import torchcodec_decoding
from pipeline.video.sources import open_source

CASES = Path(__file__).with_name("torchcodec_cases.py")


def ffmpeg_libraries(folder: Path) -> list[Path]:
    """Folders where the libraries that PyAV brings are found under their usual names.

    Args:
        folder: receives links to them.
    """
    brought = Path(av.__file__).parents[1] / "av.libs"
    for library in brought.glob("lib*.so.*"):
        usual = re.fullmatch(r"(lib(?:av|sw)\w+)-\w+(\.so\.\d+)[.\d]*", library.name)
        if usual is not None:
            (folder / f"{usual[1]}{usual[2]}").symlink_to(library)
    return [folder, brought]


@pytest.mark.skipif(find_spec("torchcodec") is None, reason="torchcodec is not installed")
@pytest.mark.timeout(600)
def test_cases_in_a_process_that_finds_ffmpeg(tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    folders = [*map(str, ffmpeg_libraries(links)), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    found = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--basetemp={tmp_path / 'b'}",
            CASES,
        ],
        cwd=CASES.parents[3],
        env={**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
    assert re.search(r"\d+ passed", found.stdout)
    assert "skipped" not in found.stdout


@pytest.mark.parametrize("failure", [ModuleNotFoundError("No module named 'torchcodec'"), OSError("a\nb")])
def test_what_is_missing_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def missing(name: str) -> None:
        raise failure

    monkeypatch.setattr(torchcodec_decoding, "import_module", missing)
    path = str(make_video(tmp_path / "a.mp4", 3))
    with pytest.raises(UsageError, match=r"install xmem-pipeline\[nvdec\]") as raised:
        open_source(path, decoder="torchcodec")
    assert "\n" not in str(raised.value)


def test_unknown_decoders_are_refused(tmp_path: Path) -> None:
    path = str(make_video(tmp_path / "a.mp4", 3))
    with pytest.raises(UsageError, match="decoder='ffmpeg' is not allowed: one of av, torchcodec"):
        open_source(path, decoder="ffmpeg")
