"""Batches by step number, prepared ahead in a separate process."""

from __future__ import annotations

import logging
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from xmem_core.training.clips import Batch, make_batch
from xmem_core.training.library import Library
from xmem_core.training.settings import TrainConfig

log = logging.getLogger(__name__)

_library: Library | None = None


def batches(
    config: TrainConfig, data_root: str | Path, first: int, last: int, ahead: int = 3
) -> Iterator[Batch]:
    """Yield the batches of steps first..last-1, in order. They depend only on the seed and the step.

    Raises FileNotFoundError, immediately, if `data_root` has no pictures.
    """
    library = Library(data_root, config.held_out_people)
    if config.workers == 0:
        return (_batch_of(library, config, step) for step in range(first, last))
    return _from_worker(config, library.root, first, last, ahead)


def _from_worker(config: TrainConfig, root: Path, first: int, last: int, ahead: int) -> Iterator[Batch]:
    pool = ProcessPoolExecutor(
        1,
        mp_context=get_context("spawn"),
        initializer=_open_library,
        initargs=(str(root), config.held_out_people),
    )
    pending: deque[Future[Batch]] = deque()
    try:
        for step in range(first, last):
            for later in range(step + len(pending), min(step + ahead, last)):
                pending.append(pool.submit(_work, config, later))
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _batch_of(library: Library, config: TrainConfig, step: int) -> Batch:
    phase = config.phase(step)
    return make_batch(library, phase.options(config.aged(step)), config.seed, step, phase.batch)


def _open_library(data_root: str, held_out_people: int) -> None:
    global _library
    # SIGINT from a terminal or service goes to the whole process group: the trainer ends the worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _library = Library(data_root, held_out_people)


def _work(config: TrainConfig, step: int) -> Batch:
    assert _library is not None
    return _batch_of(_library, config, step)
