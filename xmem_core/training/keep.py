"""Files of a training run: checkpoints, averaged weights, log and plot."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from xmem_core.config import ModelConfig
from xmem_core.network import XMem
from xmem_core.training.narrow import narrow

# Number of checkpoints kept: the newest, and the one before in case a full disk or power cut damages it.
_KEPT = 2

log = logging.getLogger(__name__)


class RunConfig(Protocol):
    """Settings of a run, as checkpoints hold them."""

    FREE: ClassVar[frozenset[str]]
    """Settings that do not affect the weights."""
    FIXED: ClassVar[frozenset[str]]
    """Settings that must be equal to resume from a checkpoint. Others may change on purpose, to end a run
    sooner or to change its curriculum; the result then differs from an unchanged run."""

    def to_dict(self) -> dict[str, Any]: ...

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self: ...


class Shape(Protocol):
    """A network's configuration."""

    def to_dict(self) -> dict[str, Any]: ...


class Stateful(Protocol):
    """An optimizer, or what else a run must restore to continue exactly."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class DamagedCheckpointError(ValueError):
    """A file of a checkpoint is missing or damaged; the message names it."""


def save_checkpoint(
    out: Path,
    step: int,
    model: nn.Module,
    averaged: dict[str, Tensor],
    optimizer: Stateful,
    config: RunConfig,
) -> Path:
    """Write out/checkpoint-<step> atomically, then remove all but it and the one before."""
    final = out / f"checkpoint-{step:08d}"
    partial = out / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, partial / "model.safetensors")
    save_file({k: v.contiguous() for k, v in averaged.items()}, partial / "averaged.safetensors")
    torch.save(optimizer.state_dict(), partial / "optimizer.pt")
    digests = {path.name: _digest(path) for path in sorted(partial.iterdir())}
    state = {"step": step, "config": config.to_dict(), "sha256": digests}
    (partial / "state.json").write_text(json.dumps(state))
    for path in partial.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    # Later ones are damaged, or belong to a run that was started over.
    kept = [p for p in checkpoints(out) if p <= final][-_KEPT:]
    remove_checkpoints(out, but=kept)
    return final


def remove_checkpoints(out: Path, but: Sequence[Path] = ()) -> None:
    """Remove a run's checkpoints, except those given."""
    for path in checkpoints(out):
        if path not in but:
            shutil.rmtree(path, ignore_errors=True)


def checkpoints(out: Path) -> list[Path]:
    """Finished checkpoints in a run's folder, newest last."""
    return sorted(p for p in out.glob("checkpoint-*") if p.is_dir())


def latest_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint in a run's folder, or None."""
    found = checkpoints(out)
    return found[-1] if found else None


def resume_from(
    out: Path,
    model: nn.Module,
    averaged: dict[str, Tensor],
    optimizer: Stateful,
    config: RunConfig,
) -> int:
    """Load the newest undamaged checkpoint and return its step; 0 if there are no checkpoints.

    Raises ValueError if all are damaged, or the one to use was made with another model or seed.
    """
    damage: list[str] = []
    for path in reversed(checkpoints(out)):
        try:
            step = load_checkpoint(path, model, averaged, optimizer, config)
        except DamagedCheckpointError as error:
            log.warning("%s; trying the previous checkpoint", error)
            damage.append(str(error))
            continue
        log.info("resuming after step %d from %s", step, path)
        return step
    if damage:
        raise ValueError(
            f"no checkpoint in {out} can be used: {'; '.join(damage)}: "
            "remove them, or start over without resuming"
        )
    return 0


def load_checkpoint(
    path: Path,
    model: nn.Module,
    averaged: dict[str, Tensor],
    optimizer: Stateful,
    config: RunConfig,
) -> int:
    """Load model, averaged weights and optimizer, all or none; returns the number of completed steps.

    Raises:
        DamagedCheckpointError: a file is missing or damaged.
        ValueError: the checkpoint was made with another model or seed.
    """
    state = _read_state(path)
    # Through the class, so that settings added since then have their defaults.
    before, now = type(config).from_dict(state["config"]).to_dict(), config.to_dict()
    differing = sorted(k for k in now if k not in config.FREE and before[k] != now[k])
    if fixed := [k for k in differing if k in config.FIXED]:
        raise ValueError(
            f"{path} was made with another {' and '.join(fixed)}: use the same, another output folder, "
            "or start over without resuming"
        )
    try:
        own = load_file(path / "model.safetensors")
        average = load_file(path / "averaged.safetensors")
        moments = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # three formats, each with its own errors
        raise DamagedCheckpointError(f"{path} is damaged: {_first_line(error)}") from error
    if differing:
        log.warning("resuming with changed settings: %s", ", ".join(differing))
    model.load_state_dict(own)
    for name, value in average.items():
        averaged[name].copy_(value)
    optimizer.load_state_dict(moments)
    return int(state["step"])


def _read_state(path: Path) -> dict[str, Any]:
    """Read a checkpoint's state.json after checking the digests of the other files."""
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
        # Checkpoints of earlier versions have no digests.
        wrong = [n for n, digest in state.get("sha256", {}).items() if _digest(path / n) != digest]
        int(state["step"]), dict(state["config"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path} is damaged: {_first_line(error)}") from error
    if wrong:
        raise DamagedCheckpointError(f"{path} is damaged: {', '.join(wrong)} does not match its checksum")
    return state


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def publish_weights(path: Path, config: Shape, weights: dict[str, Tensor]) -> None:
    """Write weights as fp16 safetensors, atomically; the metadata's `config` is the model's shape."""
    half = {k: (v.half() if v.is_floating_point() else v).contiguous().cpu() for k, v in weights.items()}
    partial = path.with_name(f".{path.name}.partial")
    # A single entry: safetensors writes several in random order, and equal weights must give equal files.
    save_file(half, partial, metadata={"config": json.dumps(config.to_dict(), sort_keys=True)})
    partial.replace(path)


def is_statistic(name: str) -> bool:
    """Whether a tensor of the state dict is a running statistic of a BatchNorm, not a trained parameter."""
    return name.endswith((".running_mean", ".running_var", ".num_batches_tracked"))


def load_weights(model: XMem, path: str | Path) -> None:
    """Load a safetensors file of any float type into the model; a wider model's is narrowed (`narrow`).

    ValueError if it belongs to another model.
    """
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata() or {}
    state: dict[str, Tensor] = load_file(path)
    if "config" in metadata:
        shape = ModelConfig.from_dict(json.loads(metadata["config"]))
        if shape != model.config:
            try:
                state = narrow(state, shape, model.config)
            except ValueError as error:
                raise ValueError(
                    f"{path} has a model of another shape: {error}; it has {metadata['config']}"
                ) from error
    problems = sorted(set(model.state_dict()) ^ set(state))
    if problems:
        raise ValueError(f"{path} does not fit the model: {', '.join(problems[:3])} exist on one side only")
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})


def trim_log(path: Path, step: int) -> None:
    """Drop log lines after a step, which a resumed run writes again, and an incomplete last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            continue
    path.write_text("".join(f"{line}\n" for line in kept))


def plot_losses(log_path: Path, png: Path) -> None:
    """Plot the log's losses and IoU over steps, as running means; no plot without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in log_path.read_text().splitlines()]
    if not lines:
        return
    figure = Figure(figsize=(8, 5.5))
    upper, lower = figure.subplots(2, 1, sharex=True)
    names = sorted({k for x in lines for k in x if k.startswith("iou")})
    # A line of the log averages only a few batches, so each point averages a thirtieth of the run.
    window = max(1, len(lines) // 30)
    for axes, shown in ((upper, ["loss", "ce", "dice"]), (lower, names)):
        for name in shown:
            points = [(x["step"], x[name]) for x in lines if name in x]
            runs = [points[max(0, i - window + 1) : i + 1] for i in range(len(points))]
            means = [sum(value for _, value in run) / len(run) for run in runs]
            axes.plot([step for step, _ in points], means, label=name, linewidth=1.2)
    upper.set_ylabel("loss")
    lower.set_ylabel("mean IoU on training batches")
    lower.set_xlabel("step")
    for axes in (upper, lower):
        axes.legend(loc="best", fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(png, dpi=80)
