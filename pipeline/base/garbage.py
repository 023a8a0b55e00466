"""Pauses the garbage collector where much is made that stays, such as modules."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """Context without garbage collections: among many objects that stay, they take longer than to make these.

    Of the time in which torch and the pipeline are imported they take a tenth.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
