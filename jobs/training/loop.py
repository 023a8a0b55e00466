"""One training stage: distributed steps, checkpoints, logs, pictures and validation.

A step depends only on the settings, the weights and the step number, so a run resumed from a checkpoint
continues as if it had never stopped, with any number of processes (up to the order of floating-point sums).
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from jobs.training.imagenet import load_resnets
from jobs.training.outputs import Outputs
from jobs.training.processes import Group
from jobs.training.samples import StageData
from jobs.training.settings import StageConfig
from pipeline.base.errors import UsageError, XmemError
from xmem_core.backbones import IMAGE_MEAN, IMAGE_STD
from xmem_core.network import XMem
from xmem_core.training.clips import Batch
from xmem_core.training.keep import latest_checkpoint, remove_checkpoints, resume_from, save_checkpoint
from xmem_core.training.loop import StopSignals
from xmem_core.training.losses import bootstrapped_cross_entropy, dice_loss, hardest_fraction, mean_iou
from xmem_core.training.unroll import Plan, draw_plan, one_hot, unroll
from xmem_core.weights import load_model, save_weights

log = logging.getLogger(__name__)

Validate = Callable[[XMem], dict[str, float]]
"""Scores a model: J&F, J and F in percent."""

WEIGHTS = "weights.safetensors"
_FAILURES = 20


class _Unrolled(nn.Module):
    """The network over a clip as one module, which is what DistributedDataParallel needs."""

    def __init__(self, network: XMem) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, masks: Tensor, present: Tensor, plan: Plan) -> list[Tensor]:
        return unroll(self.network, images, masks, present, plan)


class _Moments:
    """Optimizer and loss scale, as one thing to keep."""

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        self.optimizer, self.scaler = optimizer, scaler

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict["optimizer"])
        if state_dict["scaler"]:
            self.scaler.load_state_dict(state_dict["scaler"])


class StageTrainer:
    """Network and optimizer of a stage in one process of a group.

    Args:
        config: the stage. BatchNorm keeps its statistics throughout, as published.
        group: the processes.

    Raises:
        UsageError: the batch cannot be divided among the processes and their accumulation steps.
    """

    def __init__(self, config: StageConfig, group: Group) -> None:
        share, rest = divmod(config.batch, group.count * config.accumulate)
        if rest or not share:
            raise UsageError(
                f"batch={config.batch} is not allowed: must be a multiple of {group.count} processes times "
                f"accumulate={config.accumulate}"
            )
        self.config, self.group, self.share = config, group, share * config.accumulate
        torch.manual_seed(config.seed)
        self.model: XMem = XMem(config.model).to(group.device)
        amp = config.amp
        if amp == "auto":
            amp = "float16" if group.device.type == "cuda" else "off"
        self.dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16, "off": None}[amp]
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay
        )
        scaler = torch.amp.GradScaler(group.device.type, enabled=self.dtype is torch.float16)
        self.moments = _Moments(self.optimizer, scaler)
        self.scaler = scaler
        self.model.eval()
        self._unrolled: nn.Module | None = None

    def spread(self) -> None:
        """Make the network one of the group's; its weights are those of the first process from now on."""
        unrolled = _Unrolled(self.model)
        self._unrolled = (
            DistributedDataParallel(unrolled, broadcast_buffers=False) if self.group.count > 1 else unrolled
        )

    def shard(self) -> tuple[int, int]:
        """The clips of a batch that this process computes: first, last + 1."""
        return self.group.rank * self.share, (self.group.rank + 1) * self.share

    def step(
        self, step: int, batch: Batch, *, show: bool = False
    ) -> tuple[dict[str, float], NDArray[np.uint8] | None]:
        """Run one optimizer step on this process's share of a batch.

        Args:
            step: its number, from 0 on.
            batch: the share.
            show: also return the predicted labels.

        Returns:
            means over the share (loss, ce, dice, iou) with grad_norm and lr; labels (B, T, H, W) or None.
        """
        if self._unrolled is None:
            self.spread()
        assert self._unrolled is not None
        config, parts = self.config, self.config.accumulate
        rate = config.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rng = np.random.default_rng((config.seed, step, 1 << 20))
        plan = draw_plan(rng, config.frames, config.deep_update, config.memory_frames)
        fraction = hardest_fraction(step, config.hard_start, config.hard_end, config.hard_fraction)
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        shown = []
        size = len(batch.frames) // parts
        for part in range(parts):
            last = part == parts - 1
            ddp = self._unrolled
            quiet = (
                ddp.no_sync()
                if isinstance(ddp, DistributedDataParallel) and not last
                else contextlib.nullcontext()
            )
            with quiet:
                piece = slice(part * size, (part + 1) * size)
                loss, values, labels = self._loss(batch, piece, plan, fraction, show)
                self.scaler.scale(loss / parts).backward()
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value / parts
            if labels is not None:
                shown.append(labels)
        self.scaler.unscale_(self.optimizer)
        limit = config.grad_clip or math.inf
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        if self.scaler.is_enabled() or math.isfinite(norm):
            self.scaler.step(self.optimizer)  # skips the step if gradients are not finite
            self.scaler.update()
        else:
            log.warning("step %d: gradient norm %s; step skipped", step, norm)
        return {**sums, "grad_norm": norm, "lr": rate}, np.concatenate(shown) if shown else None

    def _loss(
        self, batch: Batch, piece: slice, plan: Plan, fraction: float, show: bool
    ) -> tuple[Tensor, dict[str, float], NDArray[np.uint8] | None]:
        """Loss of some clips: the mean over clips of the sum over frames of cross-entropy and dice."""
        assert self._unrolled is not None
        images, labels = self._tensors(batch.frames[piece], batch.labels[piece])
        counts = torch.from_numpy(batch.objects[piece]).to(self.group.device)
        objects = int(counts.max())
        present = (torch.arange(objects, device=self.group.device)[None] < counts[:, None]).float()
        with torch.autocast(self.group.device.type, self.dtype, enabled=self.dtype is not None):
            outputs: list[Tensor] = self._unrolled(images, one_hot(labels[:, 0], objects), present, plan)
        cross_entropy, dice = images.new_zeros(()), images.new_zeros(())
        clips, found = len(images), [labels[:, 0]]
        iou = 0.0
        for t, logits in enumerate(outputs, 1):
            cross_entropy = cross_entropy + bootstrapped_cross_entropy(logits, labels[:, t], fraction)
            # By clip, so that the mean does not depend on how clips are spread over processes.
            chances = torch.softmax(logits, 1)[:, 1:]
            for b in range(clips):
                one = slice(b, b + 1)
                dice = dice + dice_loss(chances[one], labels[one, t], present[one]) / clips
            best = logits.detach().argmax(1)
            found.append(best)
            iou += sum(mean_iou(best[b], labels[b, t], int(counts[b])) for b in range(clips)) / clips
        loss = cross_entropy + dice
        frames = len(outputs)
        values = {
            "loss": float(loss.detach()) / frames,
            "ce": float(cross_entropy.detach()) / frames,
            "dice": float(dice.detach()) / frames,
            "iou": iou / frames,
        }
        return loss, values, torch.stack(found, 1).to(torch.uint8).cpu().numpy() if show else None

    def _tensors(self, frames: NDArray[np.uint8], labels: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        device = self.group.device
        images = torch.from_numpy(frames).to(device).permute(0, 1, 4, 2, 3).float() / 255
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
        return (images - mean) / std, torch.from_numpy(labels).to(device).long()


class _Steps(Dataset[Batch | UsageError]):
    """This process's share of the batches of all steps; the error instead where the data cannot be used."""

    def __init__(self, data: StageData, shard: tuple[int, int]) -> None:
        self.data, self.shard = data, shard

    def __len__(self) -> int:
        return self.data.config.last_step

    def __getitem__(self, step: int) -> Batch | UsageError:
        try:
            return self.data.batch(step, *self.shard)
        except UsageError as error:  # DataLoader would raise it with a worker's traceback in its message
            return UsageError(str(error))


def _batches(data: StageData, shard: tuple[int, int], first: int) -> Iterator[Batch]:
    """Batches of the steps from `first` on, prepared ahead by the worker processes."""
    workers = data.config.workers
    loader = DataLoader(
        _Steps(data, shard),
        batch_size=None,
        sampler=range(first, data.config.last_step),
        num_workers=workers,
        collate_fn=_same,
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=_start_worker if workers else None,
    )
    for batch in loader:
        if isinstance(batch, UsageError):
            raise batch
        yield batch


def _start_worker(number: int) -> None:
    # Both may go to the whole process group; the trainer writes a checkpoint and then ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _same(batch: Any) -> Any:
    return batch


def train_stage(
    config: StageConfig,
    data_root: str | Path,
    out: Path,
    group: Group,
    *,
    init: str | Path | None = None,
    backbones: Sequence[str | Path] = (),
    resume: bool = True,
    max_hours: float = 0.0,
    validate: Validate | None = None,
) -> bool:
    """Train a stage in `out`, and write its weights there at the end.

    Args:
        config: the stage.
        data_root: folder with its data sets.
        out: folder of the stage; all processes must see it.
        group: the processes that train; the first one writes.
        init: weights to start from; a name or path for `load_model`.
        backbones: ImageNet weights to start from, see `load_resnets`.
        resume: continue from the newest undamaged checkpoint in `out`, if there is one.
        max_hours: write a checkpoint and stop after so long; 0: no limit.
        validate: called every `validate_every` steps and at the end, in the first process.

    Returns:
        Whether the stage is finished; False if it was stopped by a signal or by `max_hours`.

    Raises:
        UsageError: data, weights or a checkpoint that cannot be used. XmemError: the training failed.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    trainer = StageTrainer(config, group)
    data = StageData(config, data_root)
    first = _start(trainer, out, init, backbones, resume)
    trainer.spread()
    outputs = None
    if group.first:
        out.mkdir(parents=True, exist_ok=True)
        if not resume:
            remove_checkpoints(out)
            (out / WEIGHTS).unlink(missing_ok=True)
        config.save(out / "config.json")
        outputs = Outputs(out, first)
    started = window_start = time.monotonic()
    window: list[dict[str, float]] = []
    failures, done = 0, first
    try:
        with StopSignals() as stop:
            for step, batch in enumerate(_batches(data, trainer.shard(), first), first):
                done = step + 1
                show = bool(config.pictures_every) and done % config.pictures_every == 0
                values, labels = trainer.step(step, batch, show=show and group.first)
                late = max_hours > 0 and time.monotonic() - started > max_hours * 3600
                *means, asked = group.mean(
                    [values[k] for k in ("loss", "ce", "dice", "iou")] + [float(stop.asked or late)]
                )
                values |= dict(zip(("loss", "ce", "dice", "iou"), means, strict=True))
                failures = 0 if math.isfinite(values["loss"] + values["grad_norm"]) else failures + 1
                if failures >= _FAILURES:
                    raise XmemError(f"the loss was not finite for {failures} steps, up to step {step}")
                window.append(values)
                ending = asked > 0 or done == config.last_step
                if outputs is not None:
                    if done % config.log_every == 0 or ending:
                        line = {k: float(np.mean([w[k] for w in window])) for k in values}
                        line["s_per_step"] = (time.monotonic() - window_start) / len(window)
                        outputs.log(done, line)
                        message = "stage %s, step %d of %d: loss %.3f, IoU %.3f, %.2f s per step"
                        shown = (line["loss"], line["iou"], line["s_per_step"])
                        log.info(message, config.stage, done, config.last_step, *shown)
                        window, window_start = [], time.monotonic()
                    if labels is not None:
                        outputs.picture(done, batch, labels)
                    if done % config.checkpoint_every == 0 or ending:
                        save_checkpoint(out, done, trainer.model, {}, trainer.moments, config)
                due = config.validate_every and done % config.validate_every == 0
                if validate is not None and (due or done == config.last_step):
                    if outputs is not None:
                        scores = validate(trainer.model)
                        outputs.validated(done, scores)
                        log.info("step %d: validation J&F %.1f", done, scores["J&F"])
                    group.wait()
                if asked > 0:
                    break
    finally:
        if outputs is not None:
            outputs.close()
    if done < config.last_step:
        if group.first:
            log.info("stage %s stopped after step %d; the same command continues", config.stage, done)
        return False
    if group.first:
        save_weights(trainer.model, out / WEIGHTS, torch.float32)
    group.wait()
    return True


def _start(
    trainer: StageTrainer, out: Path, init: str | Path | None, backbones: Sequence[str | Path], resume: bool
) -> int:
    """Load the checkpoint or the weights to start from; returns the number of finished steps."""
    model = trainer.model
    if resume and latest_checkpoint(out) is not None:
        try:
            step = resume_from(out, model, {}, trainer.moments, trainer.config)
        except ValueError as error:
            raise UsageError(str(error)) from error
        trainer.group.agree(step, "the newest checkpoint")
        return step
    trainer.group.agree(0, "the newest checkpoint")
    if init is not None:
        try:
            given = load_model(init)
        except (ValueError, OSError) as error:
            raise UsageError(f"initial weights: {error}") from error
        if not isinstance(given, XMem) or given.config != model.config:
            raise UsageError(
                f"{init} has a model of another shape than this stage ({given.config!r}): give others, or "
                "change the stage's model with --config"
            )
        model.load_state_dict(given.state_dict())
    elif backbones:
        load_resnets(model, backbones)
    elif trainer.group.first:
        log.warning("no initial weights: all layers start at random; see --init and --backbone")
    return 0
