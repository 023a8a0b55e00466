"""Settings of a training run: frozen, checked when built, written to and read from JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from xmem_core.config import ModelConfig
from xmem_core.training.clips import ClipOptions

# The settings with which the bundled model was trained.
RECIPE = Path(__file__).with_name("xmem-lite.json")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_numbers(settings: Any) -> None:
    """Check types of values from JSON or a command line; ValueError names the first wrong one."""
    for each in fields(settings):
        value = getattr(settings, each.name)
        good, needed = {
            "int": (isinstance(value, int) and not isinstance(value, bool), "a whole number"),
            "float": (_is_number(value) and math.isfinite(value), "a number"),
            "bool": (isinstance(value, bool), "true or false"),
            "str": (isinstance(value, str), "a text"),
        }.get(str(each.type), (True, ""))
        if not good:
            raise ValueError(f"{each.name}={value!r} is not allowed: {needed} is needed")


@dataclass(frozen=True)
class Phase:
    """Options of the batches from a given step on.

    Args:
        frames: frames of a clip that are learnt from, including the prompted first one.
        max_gap: largest gap between two frames of a video, in its frames.
        mixture: weights of stills, video and crowds.
        aged: up to this many further frames follow the first and are run without gradients; the number is
            drawn for each step. Learning then starts from memories as old as in use, at little cost.
        pace: speed of composed objects from frame to frame, as a share of the usual.
        pace_spread: each clip's pace, and its gaps in a video, are multiplied by a factor drawn between
            1 / `pace_spread` and `pace_spread`. 1: all clips have the same pace.
        small: share of clips whose composed objects are about a quarter as large.
        leaving: share of crowds in which some people leave, and others enter after them.
        together: share of crowds that are larger, and in which some stay close together, partly hiding each
            other on most frames, and some turn round.
        smeared: share of clips with motion blur of composed objects, as by an open shutter.
    """

    from_step: int = 0
    size: int = 192
    batch: int = 8
    frames: int = 3
    max_objects: int = 2
    max_gap: int = 5
    mixture: tuple[float, float, float] = (0.35, 0.40, 0.25)
    aged: int = 0
    pace: float = 1.0
    pace_spread: float = 1.0
    small: float = 0.0
    leaving: float = 0.0
    together: float = 0.0
    smeared: float = 0.0

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.aged < 0:
            raise ValueError(f"aged={self.aged} is not allowed: must be 0 frames or more")
        if not isinstance(self.mixture, list | tuple) or not all(_is_number(w) for w in self.mixture):
            raise ValueError(f"mixture={self.mixture!r} is not allowed: must be three weights")
        object.__setattr__(self, "mixture", tuple(self.mixture))
        if self.from_step < 0 or self.batch < 1:
            raise ValueError(f"from_step {self.from_step} and batch {self.batch}: must be at least 0 and 1")
        self.options()

    def options(self, aged: int = 0) -> ClipOptions:
        """Clip options of the phase, with `aged` further frames."""
        return ClipOptions(
            self.size,
            self.frames + aged,
            self.max_objects,
            self.max_gap,
            self.mixture,
            pace=self.pace,
            pace_spread=self.pace_spread,
            small=self.small,
            leaving=self.leaving,
            together=self.together,
            smeared=self.smeared,
        )


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Args:
        model: shape of the network (default: `ModelConfig.lite()`).
        phases: the curriculum; the first begins at step 0, the others later, in order.
        backbone_lr: factor on `lr` for the key encoder's trunk; its stages to stride 4 stay fixed.
        hard_start, hard_end, hard_fraction: cross-entropy is taken over all pixels up to step `hard_start`,
            and over the hardest fraction from step `hard_end` on.
        deep_update: probability that a frame entering memory also renews the sensory memory.
        freeze_norm: fraction of the run after which the value encoder's BatchNorms keep their statistics, so
            that training ends under the conditions of use.
        max_hours: wall-clock limit of this process; then it writes a checkpoint and stops. 0: none.
        workers: 1 prepares batches in a separate process, 0 in this one.
        whiten_keys: initialise the key projection from the trunk's features, see `KeyProjection.whiten`; also
            when starting from weights, whose key projection is then not used.
        feature_scale: steps of the weights that multiply the trunk's features are smaller by this factor; 6
            is the standard deviation of EfficientNet-Lite0's features.
    """

    FREE: ClassVar[frozenset[str]] = frozenset(
        {"threads", "workers", "max_hours", "log_every", "checkpoint_every", "device"}
    )
    FIXED: ClassVar[frozenset[str]] = frozenset({"model", "seed"})

    model: ModelConfig = field(default_factory=ModelConfig.lite)
    phases: tuple[Phase, ...] = (Phase(),)
    seed: int = 0
    steps: int = 7000
    lr: float = 4e-4
    backbone_lr: float = 0.25
    last_lr: float = 0.01
    warmup: int = 200
    weight_decay: float = 0.05
    grad_clip: float = 3.0
    hard_start: int = 800
    hard_end: int = 3000
    hard_fraction: float = 0.2
    deep_update: float = 0.2
    freeze_norm: float = 0.6
    ema: float = 0.999
    checkpoint_every: int = 500
    log_every: int = 20
    held_out_people: int = 100
    threads: int = 2
    workers: int = 1
    max_hours: float = 0.0
    device: str = "cpu"
    bf16: bool = True
    whiten_keys: bool = False
    feature_scale: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(self)
        starts = [p.from_step for p in self.phases]
        if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
            raise ValueError(
                f"phases start at steps {starts}: the first must start at 0, the others later, in order"
            )
        if self.steps < 1 or self.checkpoint_every < 1 or self.log_every < 1:
            raise ValueError("steps, checkpoint_every and log_every must be at least 1")
        if self.threads < 1 or self.held_out_people < 0 or self.lr <= 0:
            raise ValueError(
                f"threads {self.threads}, held_out_people {self.held_out_people}, lr {self.lr}: "
                "must be at least 1, at least 0 and more than 0"
            )
        if not 0 <= self.warmup < self.steps:
            raise ValueError(f"warmup is {self.warmup}: it must lie in 0..{self.steps - 1}, below steps")
        if not 0 <= self.ema < 1 or not 0 <= self.deep_update <= 1 or not 0 < self.hard_fraction <= 1:
            raise ValueError("ema must be in [0, 1), deep_update in [0, 1], hard_fraction in (0, 1]")
        if self.feature_scale <= 0:
            raise ValueError(f"feature_scale={self.feature_scale} is not allowed: must be more than 0")
        if self.workers not in (0, 1):
            raise ValueError(f"workers is {self.workers}: must be 0 (this process) or 1 (a separate one)")

    def phase(self, step: int) -> Phase:
        """The phase of a step."""
        return [p for p in self.phases if p.from_step <= step][-1]

    def aged(self, step: int) -> int:
        """Number of frames of a step's clips that are run without gradients: 0 to the phase's `aged`."""
        most = self.phase(step).aged
        return int(np.random.default_rng((self.seed, step, 1 << 21)).integers(most + 1)) if most else 0

    def first_frozen_step(self) -> int:
        """The first step at which the value encoder's BatchNorms keep their statistics."""
        return math.ceil(self.freeze_norm * self.steps)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict that `from_dict` accepts."""
        values = asdict(self)
        values["model"] = self.model.to_dict()
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Build from the output of `to_dict`; omitted settings have their defaults.

        ValueError on unknown names.
        """
        if not isinstance(values, dict):
            raise ValueError("training settings must be a JSON object of names and values")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"unknown training setting {', '.join(unknown)}; known are {', '.join(sorted(known))}"
            )
        values = dict(values)
        if isinstance(values.get("model"), dict):
            values["model"] = ModelConfig.from_dict(values["model"])
        if "phases" in values:
            if not isinstance(values["phases"], list | tuple):
                raise ValueError(f"phases={values['phases']!r} is not allowed: must be a list of phases")
            values["phases"] = tuple(_as_phase(p) for p in values["phases"])
        return cls(**values)

    @classmethod
    def load(cls, path: str | Path) -> TrainConfig:
        """Read a JSON file. OSError or ValueError if it cannot be read or is not a valid configuration."""
        return cls.from_dict(json.loads(Path(path).read_text()))

    def save(self, path: str | Path) -> None:
        """Write a JSON file for `load`."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    def with_overrides(self, overrides: dict[str, Any]) -> TrainConfig:
        """Return a copy with some settings changed; None means unchanged. ValueError on unknown names."""
        given = {k: v for k, v in overrides.items() if v is not None}
        return self.from_dict({**self.to_dict(), **given})


def _as_phase(value: Phase | dict[str, Any]) -> Phase:
    if isinstance(value, Phase):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"phase {value!r} is not allowed: must be an object of names and values")
    known = {f.name for f in fields(Phase)}
    if unknown := sorted(set(value) - known):
        raise ValueError(f"unknown phase setting {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return Phase(**value)
