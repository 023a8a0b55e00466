"""Exponential backoff with jitter."""

from __future__ import annotations

import random
from dataclasses import dataclass, field


@dataclass
class Backoff:
    """Delays that grow by `factor` from `first_seconds` to `most_seconds`.

    Each delay is drawn at random between half of its step and the whole step, so that cameras that failed
    together (a restarted switch) do not reconnect all at once. `next_seconds` never exceeds `most_seconds`.

    Args:
        random: source of randomness; tests pass a seeded one.
    """

    first_seconds: float = 0.5
    most_seconds: float = 15.0
    factor: float = 2.0
    random: random.Random = field(default_factory=random.Random, repr=False)
    tries: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if not 0 < self.first_seconds <= self.most_seconds:
            raise ValueError(
                f"backoff from {self.first_seconds} to {self.most_seconds} seconds: must be 0 < first <= most"
            )
        if self.factor < 1:
            raise ValueError(f"backoff factor {self.factor}: must be at least 1")

    def next_seconds(self) -> float:
        """Return the delay before the next attempt."""
        step = self.first_seconds
        for _ in range(self.tries):
            step = min(step * self.factor, self.most_seconds)
            if step == self.most_seconds:
                break
        self.tries += 1
        return step * self.random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """Start over: the next delay is a first one again."""
        self.tries = 0
