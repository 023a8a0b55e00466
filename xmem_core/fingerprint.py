"""Fingerprint of a model: which weights a state was made with.

To hash the published weights takes 0.3 s of every start. So the fingerprint of a large model that was loaded
from a file is kept in the cache folder, by the file's path, size, time of change and inode. It is used only
while the model is as it was loaded: its tensors are the same, torch counts no change of them, and values all
over them have the same hash.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xmem_core.cache_folder import cache_folder

logger = logging.getLogger(__name__)

# Smaller models are hashed faster than a file is read.
_LEAST_BYTES = 32 << 20
# Values of each tensor that are compared.
_SAMPLES = 256
_ATTRIBUTE = "_xmem_loaded_from"


class _LoadedFrom(NamedTuple):
    """The file that a model was loaded from.

    Attributes:
        identity: what tells the file, unchanged, from others.
        tensors: identity and number of changes of each tensor after loading.
    """

    identity: str
    tensors: dict[str, tuple[int, int]]


def model_fingerprint(model: nn.Module) -> str:
    """Fingerprint of a model: a hash of its configuration and of every tensor, 32 hex digits."""
    source = model.__dict__.get(_ATTRIBUTE)
    if source is None or source.tensors != _tensors(model):
        return _of_all(model)
    kept = cache_folder() / "fingerprints" / f"{_digest(source.identity.encode())}.json"
    sample = _of_samples(model)
    try:
        entry: Any = json.loads(kept.read_text())
        if entry["file"] == source.identity and entry["sample"] == sample:
            return str(entry["fingerprint"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        logger.debug("no fingerprint at %s: %s", kept, error)
    found = _of_all(model)
    _keep(kept, {"file": source.identity, "sample": sample, "fingerprint": found})
    return found


def file_identity(path: Path) -> str:
    """What tells a file from others and from itself after a change; "" if it cannot be had."""
    try:
        about = path.stat()
    except OSError:
        return ""
    return json.dumps([str(path.resolve()), about.st_size, about.st_mtime_ns, about.st_ino, about.st_dev])


def note_source(model: nn.Module, path: Path, identity: str) -> None:
    """Note that a model was loaded from a file.

    Args:
        identity: the file's, before it was read.
    """
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    if size >= _LEAST_BYTES and identity and file_identity(path) == identity:
        model.__dict__[_ATTRIBUTE] = _LoadedFrom(identity, _tensors(model))


def _named(model: nn.Module) -> dict[str, Tensor]:
    """The model's own tensors; those of `state_dict` are new objects on each call."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _tensors(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: (id(tensor), tensor._version) for name, tensor in _named(model).items()}


def _of_all(model: nn.Module) -> str:
    digest = hashlib.blake2b(repr(model.config).encode(), digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _of_samples(model: nn.Module) -> str:
    """A hash of the configuration and of some values of every tensor."""
    digest = hashlib.blake2b(repr(model.config).encode(), digest_size=16)
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().contiguous().view(-1)
        some = flat[:: max(1, len(flat) // _SAMPLES)].cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(some.view(torch.uint8).numpy())
    return digest.hexdigest()


def _digest(text: bytes) -> str:
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def _keep(path: Path, entry: dict[str, str]) -> None:
    """Write an entry atomically; where that is not possible, the next start hashes again."""
    part: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as out:
            part = Path(out.name)
            json.dump(entry, out)
        os.replace(part, path)
    except OSError as error:
        logger.debug("the fingerprint is not kept at %s: %s", path, error)
        if part is not None:
            part.unlink(missing_ok=True)
