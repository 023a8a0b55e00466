"""Settings of a training run of the click model: frozen, checked when built, kept as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from xmem_core.clicks import ClickConfig
from xmem_core.training.clicks.samples import MIXTURE
from xmem_core.training.settings import check_numbers

# The settings with which the bundled click model was trained.
RECIPE = Path(__file__).with_name("xmem-click.json")
KIND = "clicks"


def is_click_file(path: str | Path) -> bool:
    """Whether a JSON file has settings of the click model."""
    try:
        values = json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("kind") == KIND


@dataclass(frozen=True)
class ClickPhase:
    """Options of the batches from a given step on.

    Args:
        size: pixels of the square cuts, a multiple of 16.
        batch: cuts in a batch.
        passes: shares of batches with one, two, ... rounds of clicks.
        mixture: shares of ecssd, people, coco, davis and video.
    """

    from_step: int = 0
    size: int = 256
    batch: int = 8
    passes: tuple[float, ...] = (0.2, 0.3, 0.3, 0.2)
    mixture: tuple[float, ...] = MIXTURE

    def __post_init__(self) -> None:
        check_numbers(self)
        object.__setattr__(self, "passes", tuple(self.passes))
        object.__setattr__(self, "mixture", tuple(self.mixture))
        if self.from_step < 0 or self.batch < 1 or self.size < 32 or self.size % 16:
            raise ValueError(
                f"from_step {self.from_step}, batch {self.batch}, size {self.size}: "
                "must be at least 0, at least 1 and a multiple of 16"
            )
        for name, shares in (("passes", self.passes), ("mixture", self.mixture)):
            if not shares or min(shares) < 0 or sum(shares) <= 0:
                raise ValueError(f"{name}={shares!r} is not allowed: shares, one at least more than 0")
        if len(self.mixture) != len(MIXTURE):
            raise ValueError(f"mixture={self.mixture!r} is not allowed: {len(MIXTURE)} shares")


@dataclass(frozen=True)
class ClickTrainConfig:
    """A training run of the click model.

    Args:
        model: the network's widths.
        phases: the curriculum; the first begins at step 0, the others later, in order.
        trunk_lr: factor on `lr` for the trunk, which is trained from stride 8 on.
        freeze_norm: fraction of the run after which BatchNorms keep their statistics.
        ema: decay of the running average of the weights.
    """

    FREE: ClassVar[frozenset[str]] = frozenset(
        {"threads", "max_hours", "log_every", "checkpoint_every", "device"}
    )
    FIXED: ClassVar[frozenset[str]] = frozenset({"model", "seed"})

    model: ClickConfig = field(default_factory=ClickConfig)
    phases: tuple[ClickPhase, ...] = (ClickPhase(),)
    seed: int = 0
    steps: int = 3000
    lr: float = 6e-4
    trunk_lr: float = 0.3
    last_lr: float = 0.02
    warmup: int = 100
    weight_decay: float = 0.03
    grad_clip: float = 5.0
    freeze_norm: float = 0.7
    ema: float = 0.998
    checkpoint_every: int = 100
    log_every: int = 20
    threads: int = 2
    max_hours: float = 0.0
    device: str = "cpu"
    bf16: bool = True

    def __post_init__(self) -> None:
        check_numbers(self)
        starts = [p.from_step for p in self.phases]
        if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
            raise ValueError(
                f"phases start at steps {starts}: the first must start at 0, the others in order"
            )
        if self.steps < 1 or self.checkpoint_every < 1 or self.log_every < 1 or self.threads < 1:
            raise ValueError("steps, checkpoint_every, log_every and threads must be at least 1")
        if not 0 <= self.warmup < self.steps or self.lr <= 0 or not 0 <= self.ema < 1:
            raise ValueError("warmup must lie below steps, lr above 0 and ema in [0, 1)")

    def phase(self, step: int) -> ClickPhase:
        """The phase of a step."""
        return [p for p in self.phases if p.from_step <= step][-1]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict that `from_dict` accepts."""
        return {"kind": KIND, **asdict(self), "model": self.model.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ClickTrainConfig:
        """Build from the output of `to_dict`; omitted settings have their defaults.

        ValueError on unknown names.
        """
        values = {k: v for k, v in values.items() if k != "kind"}
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"unknown training setting {', '.join(unknown)}; known are {', '.join(sorted(known))}"
            )
        if isinstance(values.get("model"), dict):
            values["model"] = ClickConfig.from_dict(values["model"])
        if "phases" in values:
            values["phases"] = tuple(
                p if isinstance(p, ClickPhase) else ClickPhase(**p) for p in values["phases"]
            )
        return cls(**values)

    @classmethod
    def load(cls, path: str | Path) -> ClickTrainConfig:
        """Read a JSON file. OSError or ValueError if it cannot be read or is not a valid configuration."""
        return cls.from_dict(json.loads(Path(path).read_text()))

    def save(self, path: str | Path) -> None:
        """Write a JSON file for `load`."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    def with_overrides(self, overrides: dict[str, Any]) -> ClickTrainConfig:
        """Return a copy with some settings changed. ValueError on unknown names."""
        return self.from_dict({**self.to_dict(), **overrides})
