"""The cache folder: downloaded weights and fingerprints, which can be deleted at any time."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$XMEM_CACHE, else $XDG_CACHE_HOME/xmem, else ~/.cache/xmem."""
    if own := os.environ.get("XMEM_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "xmem"
