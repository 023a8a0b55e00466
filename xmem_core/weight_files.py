"""Finding weights: the bundled models, the published checkpoints, files. Without torch."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import shutil
import tempfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from xmem_core.cache_folder import cache_folder

logger = logging.getLogger(__name__)

BUNDLED_FOLDER = Path(__file__).parent / "checkpoints"
BUNDLED = ("xmem-lite",)
BUNDLED_CLICKS = BUNDLED_FOLDER / "xmem-click.safetensors"
"""Weights of `xmem_core.clicks.ClickNet`."""

_RELEASE = "https://github.com/hkchengrex/XMem/releases/download/v1.0"
_CUTIE_RELEASE = "https://github.com/hkchengrex/Cutie/releases/download/v1.0"
_TIMEOUT_S = 30
_BLOCK = 1 << 20

Progress = Callable[[int, int | None], None]
"""Called with the bytes received so far and the bytes expected, if known."""


@dataclass(frozen=True)
class _Published:
    file: str
    sha256: str | None  # None: no verified hash of the authors' file is known
    md5: str | None = None  # as the authors' own download script has it
    cutie: bool = False

    @property
    def url(self) -> str:
        return f"{_CUTIE_RELEASE if self.cutie else _RELEASE}/{self.file}"


_PUBLISHED = {
    "xmem": _Published("XMem.pth", None),
    "xmem-s012": _Published("XMem-s012.pth", None),
    "xmem-s2": _Published("XMem-s2.pth", None),
    "xmem-no-sensory": _Published("XMem-no-sensory.pth", None),
    "cutie-base": _Published("cutie-base-mega.pth", None, "a6071de6136982e396851903ab4c083a", cutie=True),
    "cutie-small": _Published("cutie-small-mega.pth", None, cutie=True),
}

MODEL_NAMES = (*BUNDLED, *_PUBLISHED)


class WeightsError(ValueError):
    """Weights are missing, damaged, or belong to another network; the message says what to do."""


def find_weights(name: str | os.PathLike[str], *, progress: Progress | None = None) -> Path:
    """Path of the file that `load_model` loads; published checkpoints are downloaded if not cached."""
    text = os.fspath(name)
    if text in BUNDLED:
        path = BUNDLED_FOLDER / f"{text}.safetensors"
        if not path.is_file():
            raise WeightsError(f"the bundled model {text!r} is not at {path}: reinstall the package")
        return path
    if text in _PUBLISHED:
        published = _PUBLISHED[text]
        path = cache_folder() / published.file
        if not path.is_file():
            _download(published, path, progress)
        return path
    path = Path(text).expanduser()
    if not path.is_file():
        raise WeightsError(
            f"no model {text!r}: give one of {', '.join(MODEL_NAMES)}, or the path of a "
            ".pth or .safetensors file"
        )
    return path


def _download(published: _Published, path: Path, progress: Progress | None) -> None:
    """Download to a temporary name, verify length and hash, then rename."""
    url, sha256 = published.url, published.sha256
    logger.info("downloading %s to %s", url, path)
    part: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response,
            tempfile.NamedTemporaryFile(
                dir=path.parent, prefix=path.name, suffix=".part", delete=False
            ) as out,
        ):
            part = Path(out.name)
            header = response.headers.get("Content-Length")
            expected = int(header) if header else None
            digest, weak = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
            received = 0
            while block := response.read(_BLOCK):
                out.write(block)
                digest.update(block)
                weak.update(block)
                received += len(block)
                if progress is not None:
                    progress(received, expected)
        if expected is not None and received != expected:
            raise WeightsError(f"{url} broke off after {received} of {expected} bytes: try again")
        if sha256 is not None and digest.hexdigest() != sha256:
            raise WeightsError(f"{url} has SHA-256 {digest.hexdigest()}, not {sha256}: not the authors' file")
        if published.md5 is not None and weak.hexdigest() != published.md5:
            found = weak.hexdigest()
            raise WeightsError(f"{url} has MD5 {found}, not {published.md5}: not the authors' file")
        logger.info("%s: %d bytes, SHA-256 %s", path.name, received, digest.hexdigest())
        shutil.move(part, path)
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        reason = getattr(error, "reason", error)
        raise WeightsError(
            f"{path.name} is not in the cache and cannot be downloaded ({reason}): "
            f"get {url} elsewhere and put it at {path}"
        ) from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)
