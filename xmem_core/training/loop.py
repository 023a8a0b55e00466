"""The loop around training steps: log, checkpoints, stopping. The same for every network."""

from __future__ import annotations

import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeVar

import numpy as np

log = logging.getLogger(__name__)

_Batch = TypeVar("_Batch")
# Steps in a row whose loss may be infinite or NaN.
_FAILURES = 20


class LoopConfig(Protocol):
    """The settings that the loop reads."""

    @property
    def steps(self) -> int: ...
    @property
    def log_every(self) -> int: ...
    @property
    def checkpoint_every(self) -> int: ...
    @property
    def max_hours(self) -> float: ...


def run_steps(
    config: LoopConfig,
    out: Path,
    first: int,
    batches: Iterable[_Batch],
    step_on: Callable[[int, _Batch], dict[str, float]],
    keep: Callable[[int], None],
) -> None:
    """Run the steps from `first` on, one for each batch.

    Args:
        config: how often to log and to keep, and `max_hours`, after which the loop ends.
        out: folder of log.jsonl, to which a line is added every `log_every` steps.
        first: number of the first step.
        batches: one for each step.
        step_on: runs a step; returns what is logged, with `loss` and `grad` among it.
        keep: called with the number of finished steps, to write a checkpoint.

    Raises:
        RuntimeError: the loss was not finite for 20 steps in a row.
    """
    started = time.monotonic()
    window: list[dict[str, float]] = []
    window_start, failures = started, 0
    with StopSignals() as stop, (out / "log.jsonl").open("a") as log_file:
        for step, batch in enumerate(batches, first):
            result = step_on(step, batch)
            failures = 0 if math.isfinite(result["loss"] + result["grad"]) else failures + 1
            if failures >= _FAILURES:
                raise RuntimeError(f"the loss was not finite for {failures} steps, up to step {step}")
            window.append(result)
            done = step + 1
            late = config.max_hours > 0 and time.monotonic() - started > config.max_hours * 3600
            ending = stop.asked or late
            if done % config.log_every == 0 or done == config.steps or ending:
                now = time.monotonic()
                line = {"step": done, **_means(window), "s_per_step": (now - window_start) / len(window)}
                log_file.write(json.dumps({k: _short(v) for k, v in line.items()}) + "\n")
                log_file.flush()
                log.info(
                    "step %d of %d: loss %.3f, %.2f s per step",
                    done,
                    config.steps,
                    line["loss"],
                    line["s_per_step"],
                )
                window, window_start = [], now
            if done % config.checkpoint_every == 0 or done == config.steps or ending:
                keep(done)
                window_start = time.monotonic() if not window else window_start
            if ending:
                log.info("stopped after step %d: %s", done, "max_hours is over" if late else "asked to")
                break


class StopSignals:
    """While entered, SIGTERM and SIGINT only set `asked`; has no effect outside the main thread."""

    asked = False

    def __enter__(self) -> StopSignals:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


def _means(window: list[dict[str, float]]) -> dict[str, float]:
    names = sorted({name for line in window for name in line})
    return {n: float(np.mean([line[n] for line in window if n in line])) for n in names}


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.5g}")
