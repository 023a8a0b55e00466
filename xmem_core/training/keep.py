"""What a training run leaves on disk: checkpoints, averaged weights, the log and its plot."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from xmem_core.config import ModelConfig
from xmem_core.network import XMem
from xmem_core.training.settings import TrainConfig

# Settings without influence on the weights.
_FREE = {"threads", "workers", "max_hours", "log_every", "checkpoint_every", "device"}
# Settings that a checkpoint can't be gone on with if they differ. The others may be changed on purpose, to
# end a run sooner or to change its curriculum; what then comes is another run.
_FIXED = {"model", "seed"}

log = logging.getLogger(__name__)


def save_checkpoint(
    out: Path,
    step: int,
    model: XMem,
    averaged: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
) -> Path:
    """Writes out/checkpoint-<step> whole or not at all, then removes the older ones."""
    final = out / f"checkpoint-{step:08d}"
    partial = out / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, partial / "model.safetensors")
    save_file({k: v.contiguous() for k, v in averaged.items()}, partial / "averaged.safetensors")
    torch.save(optimizer.state_dict(), partial / "optimizer.pt")
    (partial / "state.json").write_text(json.dumps({"step": step, "config": config.to_dict()}))
    for path in partial.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    for older in _checkpoints(out):
        if older != final:
            shutil.rmtree(older, ignore_errors=True)
    return final


def _checkpoints(out: Path) -> list[Path]:
    return sorted(p for p in out.glob("checkpoint-*") if p.is_dir())


def latest_checkpoint(out: Path) -> Path | None:
    """The newest complete checkpoint of a run's folder."""
    found = _checkpoints(out)
    return found[-1] if found else None


def load_checkpoint(
    path: Path,
    model: XMem,
    averaged: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
) -> int:
    """Fills model, averaged weights and optimizer; returns the number of steps done.

    Raises ValueError if the checkpoint was made with another model or seed.
    """
    state = json.loads((path / "state.json").read_text())
    before, now = state["config"], json.loads(json.dumps(config.to_dict()))
    differing = sorted(k for k in now if k not in _FREE and before.get(k) != now[k])
    if fixed := [k for k in differing if k in _FIXED]:
        raise ValueError(
            f"{path} was made with another {' and '.join(fixed)}: give the same, another output folder, "
            "or start over without resuming"
        )
    if differing:
        log.warning("resuming with changed settings: %s", ", ".join(differing))
    model.load_state_dict(load_file(path / "model.safetensors"))
    for name, value in load_file(path / "averaged.safetensors").items():
        averaged[name].copy_(value)
    optimizer.load_state_dict(torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True))
    return int(state["step"])


def publish_weights(path: Path, config: ModelConfig, weights: dict[str, Tensor], step: int) -> None:
    """Writes weights as fp16 safetensors, atomically; the metadata's `config` is the model's shape."""
    half = {k: (v.half() if v.is_floating_point() else v).contiguous().cpu() for k, v in weights.items()}
    partial = path.with_name(f".{path.name}.partial")
    save_file(half, partial, metadata={"config": json.dumps(config.to_dict()), "step": str(step)})
    partial.replace(path)


def load_weights(model: XMem, path: str | Path) -> None:
    """Fills the model from a safetensors file of any float type. ValueError if it is another model's."""
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata() or {}
    if "config" in metadata and ModelConfig.from_dict(json.loads(metadata["config"])) != model.config:
        raise ValueError(
            f"{path} holds a model of another shape: {metadata['config']}; train with that shape"
        )
    state = load_file(path)
    problems = sorted(set(model.state_dict()) ^ set(state))
    if problems:
        raise ValueError(f"{path} does not fit the model: {', '.join(problems[:3])} only on one side")
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})


def trim_log(path: Path, step: int) -> None:
    """Drops the lines after a step, which a run resumed there will write again; and a torn last line."""
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
    """Draws the log's losses and agreement over steps; without matplotlib there is no plot."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in log_path.read_text().splitlines()]
    if not lines:
        return
    figure = Figure(figsize=(9, 6))
    upper, lower = figure.subplots(2, 1, sharex=True)
    for name in ("loss", "ce", "dice"):
        upper.plot([x["step"] for x in lines], [x[name] for x in lines], label=name)
    for name in sorted({k for x in lines for k in x if k.startswith("iou")}):
        chosen = [x for x in lines if name in x]
        lower.plot([x["step"] for x in chosen], [x[name] for x in chosen], label=name, linewidth=1)
    upper.set_ylabel("loss")
    lower.set_ylabel("mean IoU on training batches")
    lower.set_xlabel("step")
    for axes in (upper, lower):
        axes.legend(loc="best", fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(png, dpi=90)
