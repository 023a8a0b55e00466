"""Settings of a published training stage: frozen, checked when built, one JSON file per stage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from pipeline.base.errors import UsageError
from xmem_core.config import ModelConfig
from xmem_core.training.settings import check_numbers

STAGE_FILES = {
    "0": "stage-0-static.json",
    "1": "stage-1-bl30k.json",
    "2": "stage-2-davis-youtube.json",
    "3": "stage-3-combined.json",
}
"""The published stages and their files, beside this module."""

LAYOUTS = ("fss", "pairs", "clips")
AMP = ("auto", "float16", "bfloat16", "off")


@dataclass(frozen=True)
class Source:
    """A data set below the data folder.

    Args:
        layout: `fss` (folders of classes with `1.jpg` and `1.png`), `pairs` (`x.jpg` and `x.png`) or `clips`
            (`JPEGImages/<clip>/` and `Annotations/<clip>/`, both perhaps with a folder `480p` between).
        folders: where it may be; the first that exists is used.
        repeat: how often each of its items occurs in an epoch.
        split: list of clips, `ImageSets/<split>.txt` of the data set, or a .txt file below the data folder.
            Empty: all clips.
        annotated_every: every so many frames of the video have a file; gaps are divided by it.
        rendered: frames are not rotated or sheared, crops may be smaller, tiny objects are not chosen.
        optional: training may do without it.
    """

    layout: str
    folders: tuple[str, ...]
    repeat: int = 1
    split: str = ""
    annotated_every: int = 1
    rendered: bool = False
    optional: bool = False

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout={self.layout!r} is not allowed: choose one of {', '.join(LAYOUTS)}")
        folders = self.folders
        if isinstance(folders, str) or not folders or not all(isinstance(f, str) for f in folders):
            raise ValueError(f"folders={folders!r} is not allowed: must be a list of folders")
        object.__setattr__(self, "folders", tuple(folders))
        if self.repeat < 1 or self.annotated_every < 1:
            raise ValueError("repeat and annotated_every must be at least 1")


@dataclass(frozen=True)
class StageConfig:
    """A training stage. Steps are optimizer steps, whatever the number of processes.

    Args:
        stage: its number, as `--stage` takes it.
        sources: data sets; a step's clips are drawn from all of them, each item once per epoch.
        batch: clips per step, over all processes.
        accumulate: parts in which a process computes its share of a batch, one after another, to save memory.
        frames: frames per clip, including the first one with the masks.
        memory_frames: frames in memory: the first, and others at random.
        steps: steps of the schedule.
        finetune: further steps with weaker augmentation.
        gaps: curriculum of the largest gap between frames: (share of `steps`, gap), the first from 0 on.
        lr_steps: steps at which the learning rate is multiplied by `lr_gamma`.
        hard_start, hard_end, hard_fraction: cross-entropy is taken over all pixels up to step `hard_start`,
            and over the hardest fraction from step `hard_end` on.
        deep_update: probability that a frame that enters memory also renews the sensory memory.
        grad_clip: largest norm of the gradients; 0: no limit, as published.
        amp: `auto` is float16 with loss scaling on CUDA, as published, and off on a CPU.
        workers: processes per training process that prepare clips; 0: none.
        threads: CPU threads of a training process; 0: PyTorch's default.
    """

    FREE: ClassVar[frozenset[str]] = frozenset(
        {
            "workers",
            "threads",
            "device",
            "accumulate",
            "log_every",
            "checkpoint_every",
            "pictures_every",
            "validate_every",
        }
    )
    FIXED: ClassVar[frozenset[str]] = frozenset({"stage", "model", "seed"})

    stage: str
    sources: tuple[Source, ...]
    model: ModelConfig = field(default_factory=ModelConfig)
    seed: int = 0
    steps: int = 150_000
    finetune: int = 0
    batch: int = 8
    accumulate: int = 1
    size: int = 384
    frames: int = 8
    memory_frames: int = 3
    max_objects: int = 3
    gaps: tuple[tuple[float, int], ...] = ((0.0, 1),)
    lr: float = 1e-5
    lr_steps: tuple[int, ...] = ()
    lr_gamma: float = 0.1
    weight_decay: float = 0.05
    hard_start: int = 20_000
    hard_end: int = 70_000
    hard_fraction: float = 0.15
    deep_update: float = 0.2
    grad_clip: float = 0.0
    amp: str = "auto"
    device: str = "cpu"
    workers: int = 4
    threads: int = 0
    log_every: int = 100
    pictures_every: int = 1000
    checkpoint_every: int = 5000
    validate_every: int = 10_000

    def __post_init__(self) -> None:
        check_numbers(self)
        object.__setattr__(self, "gaps", tuple((s, g) for s, g in self.gaps))
        object.__setattr__(self, "lr_steps", tuple(self.lr_steps))
        for name in ("steps", "batch", "accumulate", "max_objects", "log_every", "checkpoint_every"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in (
            "seed",
            "finetune",
            "workers",
            "threads",
            "grad_clip",
            "pictures_every",
            "validate_every",
        ):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        _require(self.frames >= 3, "frames", self.frames, "at least 3, so that the sensory memory is trained")
        _require(self.memory_frames >= 1, "memory_frames", self.memory_frames, "at least 1")
        _require(self.size >= 32 and self.size % 16 == 0, "size", self.size, "a multiple of 16, at least 32")
        _require(self.lr > 0, "lr", self.lr, "more than 0")
        _require(0 < self.hard_fraction <= 1, "hard_fraction", self.hard_fraction, "in (0, 1]")
        _require(0 <= self.deep_update <= 1, "deep_update", self.deep_update, "0 to 1")
        _require(self.amp in AMP, "amp", self.amp, f"one of {', '.join(AMP)}")
        on_cpu = not self.device.startswith("cuda")
        _require(not (on_cpu and self.amp == "float16"), "amp", self.amp, "bfloat16 or off on a CPU")
        _require(bool(self.sources), "sources", list(self.sources), "at least one")
        starts = [share for share, _ in self.gaps]
        ordered = bool(starts) and starts[0] == 0 and sorted(set(starts)) == starts
        _require(ordered, "gaps", self.gaps, "shares in rising order, the first 0")
        _require(min(g for _, g in self.gaps) >= 1, "gaps", self.gaps, "gaps of at least 1 frame")

    @property
    def last_step(self) -> int:
        """Number of steps including the fine-tuning."""
        return self.steps + self.finetune

    def max_gap(self, step: int) -> int:
        """The largest gap between frames at a step."""
        return [gap for share, gap in self.gaps if round(share * self.steps) <= step][-1]

    def is_finetuning(self, step: int) -> bool:
        """Whether a step belongs to the fine-tuning."""
        return step >= self.steps

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.lr * self.lr_gamma ** sum(step >= each for each in self.lr_steps)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dict for `from_dict`."""
        values = json.loads(json.dumps({**asdict(self), "model": self.model.to_dict()}))
        assert isinstance(values, dict)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StageConfig:
        """Build from the output of `to_dict`; omitted settings have their defaults.

        Raises ValueError on unknown names and on values that are not allowed.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"unknown setting of a stage {', '.join(unknown)}; known are {', '.join(sorted(known))}"
            )
        values = dict(values)
        if isinstance(values.get("model"), dict):
            values["model"] = ModelConfig.from_dict(values["model"])
        try:
            values["sources"] = tuple(
                each if isinstance(each, Source) else Source(**each) for each in values["sources"]
            )
            return cls(**values)
        except (TypeError, LookupError) as error:
            raise ValueError(f"settings of a training stage: {error}") from None

    @classmethod
    def load(cls, path: str | Path) -> StageConfig:
        """Read a JSON file. OSError or ValueError if it is not a valid configuration."""
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(values, dict) or "stage" not in values or "sources" not in values:
            raise ValueError("no training stage: it has no stage and no sources")
        return cls.from_dict(values)

    def save(self, path: str | Path) -> None:
        """Write a JSON file for `load`."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def with_overrides(self, overrides: dict[str, Any]) -> StageConfig:
        """A copy with some settings changed. ValueError on unknown names and values that are not allowed."""
        return self.from_dict({**self.to_dict(), **overrides})


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value!r} is not allowed: {allowed}")


def published_stages(stages: str) -> list[StageConfig]:
    """The published configurations of stages, as `--stage` names them: `03` is stage 0, then stage 3.

    Raises UsageError if it names no stages, or one twice.
    """
    if not stages or set(stages) - set(STAGE_FILES) or len(set(stages)) != len(stages):
        raise UsageError(
            f"--stage {stages!r} is not allowed: give stages in their order, each once, such as 0, 03 or 012 "
            "(0 stills, 1 BL30K, 2 DAVIS and YouTube-VOS, 3 the same, shorter)"
        )
    return load_stages([str(Path(__file__).with_name(STAGE_FILES[stage])) for stage in stages])


def load_stages(paths: Sequence[str]) -> list[StageConfig]:
    """Configurations from JSON files. Raises UsageError if one cannot be read or is not valid."""
    found = []
    for path in paths:
        try:
            found.append(StageConfig.load(path))
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"training settings {path}: {error}") from error
    return found


def is_stage_file(path: str) -> bool:
    """Whether a JSON file has the settings of a stage, not those of a small model's recipe."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "stage" in values
