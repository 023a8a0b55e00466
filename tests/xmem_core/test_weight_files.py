"""Finding weights: published files in the cache and downloads."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from xmem_core import WeightsError, load_model
from xmem_core import weight_files as module
from xmem_core.weight_files import find_weights


@dataclass
class Release:
    """A local server in place of the release's."""

    content: bytes
    sent: int | None = None  # breaks off after so many bytes
    status: int = 200
    garbage: bool = False  # answers with something that is not HTTP
    length: bool = True  # says how long the file is
    paths: list[str] = field(default_factory=list)


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Release]:
    served = Release(bytes(range(256)) * 40)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.paths.append(self.path)
            if served.garbage:
                self.wfile.write(b"not http at all\r\n\r\n")
                return
            self.send_response(served.status)
            if served.length:
                self.send_header("Content-Length", str(len(served.content)))
            self.end_headers()
            self.wfile.write(served.content[: served.sent])

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("XMEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_RELEASE", f"http://127.0.0.1:{server.server_port}/v1.0")
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


def nothing_is_left(folder: Path) -> bool:
    return not folder.exists() or not list(folder.iterdir())


def test_cuties_release_and_hash_are_its_own(
    release: Release, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert module._PUBLISHED["cutie-base"].url == (
        "https://github.com/hkchengrex/Cutie/releases/download/v1.0/cutie-base-mega.pth"
    )
    monkeypatch.setattr(module, "_CUTIE_RELEASE", module._RELEASE)
    assert find_weights("cutie-small").name == "cutie-small-mega.pth"
    with pytest.raises(
        WeightsError, match=r"has MD5 \w+, not a6071de6136982e396851903ab4c083a: not the auth"
    ):
        find_weights("cutie-base")
    assert not (tmp_path / "cache" / "cutie-base-mega.pth").exists()


def test_a_download_reports_its_progress_and_is_kept(
    release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK", 4096)
    told: list[tuple[int, int | None]] = []
    path = find_weights("xmem-s2", progress=lambda done, total: told.append((done, total)))
    assert path == tmp_path / "cache" / "XMem-s2.pth"
    assert path.read_bytes() == release.content
    assert told == [(4096, 10240), (8192, 10240), (10240, 10240)]
    assert release.paths == ["/v1.0/XMem-s2.pth"]
    assert find_weights("xmem-s2") == path
    assert len(release.paths) == 1
    assert list(path.parent.iterdir()) == [path]


def test_a_download_of_unknown_length_is_taken(release: Release) -> None:
    release.length = False
    told: list[tuple[int, int | None]] = []
    path = find_weights("xmem", progress=lambda done, total: told.append((done, total)))
    assert path.read_bytes() == release.content
    assert told[-1] == (10240, None)


def test_a_download_that_breaks_off_is_not_kept(release: Release, tmp_path: Path) -> None:
    release.sent = 5000
    with pytest.raises(WeightsError, match=r"XMem\.pth broke off after 5000 of 10240 bytes: try again"):
        find_weights("xmem")
    assert nothing_is_left(tmp_path / "cache")
    release.sent = None
    assert find_weights("xmem").read_bytes() == release.content


@pytest.mark.parametrize("right", [True, False])
def test_a_known_hash_is_verified(
    release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: bool
) -> None:
    expected = hashlib.sha256(release.content if right else b"other").hexdigest()
    monkeypatch.setitem(module._PUBLISHED, "xmem", module._Published("XMem.pth", expected))
    if right:
        assert find_weights("xmem").read_bytes() == release.content
        return
    with pytest.raises(WeightsError, match=f"not {expected}: not the authors' file"):
        find_weights("xmem")
    assert nothing_is_left(tmp_path / "cache")


def test_a_missing_release_file_and_a_server_of_another_kind_are_named(
    release: Release, tmp_path: Path
) -> None:
    release.status = 404
    with pytest.raises(
        WeightsError, match=r"XMem\.pth is not in the cache and cannot be downloaded \(Not Found"
    ):
        find_weights("xmem")
    release.garbage = True
    with pytest.raises(WeightsError, match=r"XMem\.pth is not in the cache and cannot be downloaded"):
        find_weights("xmem")
    assert nothing_is_left(tmp_path / "cache")


def test_offline_the_error_names_the_file_and_its_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("XMEM_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "_RELEASE", "http://127.0.0.1:9/v1.0")  # nobody listens there
    with pytest.raises(WeightsError) as caught:
        load_model("xmem-s012")
    said = str(caught.value)
    assert "XMem-s012.pth is not in the cache" in said
    assert "get http://127.0.0.1:9/v1.0/XMem-s012.pth elsewhere" in said
    assert f"put it at {tmp_path / 'XMem-s012.pth'}" in said
    assert "\n" not in said


def test_a_cache_that_cannot_be_made_is_named(release: Release, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in the folder's place")
    with pytest.raises(WeightsError, match=r"cannot be downloaded \(.*File exists"):
        find_weights("xmem")
