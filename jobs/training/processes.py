"""Distributed training processes: torchrun's environment variables, and collective communication."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed as dist

from pipeline.base.errors import UsageError

WAIT = timedelta(hours=6)
"""How long processes wait for each other: the first one validates meanwhile."""


@dataclass(frozen=True)
class Group:
    """One of `count` processes, and its device."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def mean(self, values: list[float]) -> list[float]:
        """Means of each value over the processes."""
        if self.count == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device) / self.count
        dist.all_reduce(tensor)
        return [float(v) for v in tensor]

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.mean([0.0])

    def agree(self, number: int, what: str) -> None:
        """Raise UsageError in all processes unless `number` is the same in all."""
        if self.count > 1:
            mine = torch.tensor([number, -number], dtype=torch.int64, device=self.device)
            dist.all_reduce(mine, dist.ReduceOp.MAX)
            if int(mine[0]) != -int(mine[1]):
                raise UsageError(f"{what} differs between processes: they must share the output folder")


@contextmanager
def joined(device: str) -> Iterator[Group]:
    """Join the processes that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK); alone without it.

    Uses NCCL on CUDA, Gloo on CPUs. `cuda` is the GPU of the process's number on its machine.
    """
    count, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"device={device} is not allowed: PyTorch finds no CUDA here")
    if device == "cuda" and count > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    place = torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if count == 1:
        yield Group(0, 1, place)
        return
    started = not dist.is_initialized()  # Ray Train has done so
    if started:
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=WAIT)
    try:
        yield Group(rank, count, place)
    finally:
        if started:
            dist.destroy_process_group()
