"""The training loop: steps, schedule, averaged weights, checkpoints, log and plot.

A step depends only on the settings, the weights and the step number (data and random choices are drawn from
seed and step), so a run resumed from a checkpoint continues as if it had never stopped.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xmem_core.backbones import IMAGE_MEAN, IMAGE_STD, EfficientNetLite0Trunk
from xmem_core.network import XMem
from xmem_core.training.clips import Batch, make_batch
from xmem_core.training.keep import (
    is_statistic,
    latest_checkpoint,
    load_weights,
    plot_losses,
    publish_weights,
    remove_checkpoints,
    resume_from,
    save_checkpoint,
    trim_log,
)
from xmem_core.training.library import Library
from xmem_core.training.loader import batches
from xmem_core.training.loop import run_steps
from xmem_core.training.losses import bootstrapped_cross_entropy, dice_loss, hardest_fraction, mean_iou
from xmem_core.training.settings import TrainConfig
from xmem_core.training.speed import tune_for_cpu
from xmem_core.training.unroll import draw_plan, one_hot, unroll
from xmem_core.weights import mean_state

log = logging.getLogger(__name__)

_WHITENING_CLIPS = 64


class Trainer:
    """Network, averaged weights and optimizer of a run. `step` updates all three with one batch."""

    def __init__(self, config: TrainConfig, backbone: str | Path | None = None) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.device = torch.device(config.device)
        model = XMem(config.model)
        if backbone is not None:
            model.load_backbone(backbone)
        self.model: XMem = model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.device.type == "cpu" and config.bf16:
            tune_for_cpu(self.model)
        trunk = self.model.key_encoder
        if isinstance(trunk, EfficientNetLite0Trunk):
            for module in trunk.stages_to_stride_4():
                module.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self._groups(), lr=config.lr, betas=(0.9, 0.999))
        self._average_anew()
        self._on_features = [] if config.feature_scale == 1 else self.model.weights_on_features()

    def _average_anew(self) -> None:
        self.averaged = {name: t.detach().clone() for name, t in self.model.state_dict().items()}

    def _groups(self) -> list[dict[str, Any]]:
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((name.startswith("key_encoder."), parameter.ndim > 1), []).append(parameter)
        return [
            {
                "params": parameters,
                "factor": self.config.backbone_lr if backbone else 1.0,
                "weight_decay": self.config.weight_decay if decays else 0.0,
            }
            for (backbone, decays), parameters in sorted(groups.items())
        ]

    def use_weights(self, *paths: str | Path) -> None:
        """Start from a weights file, or the mean of several. ValueError if one does not fit the model."""
        states = []
        for path in paths:
            load_weights(self.model, path)
            states.append({name: t.clone() for name, t in self.model.state_dict().items()})
        self.model.load_state_dict(mean_state(states))
        self._average_anew()

    @torch.no_grad()
    def whiten_keys(self, library: Library) -> None:
        """Initialise the key projection, see `KeyProjection.whiten`, from pictures as in the first steps."""
        options = self.config.phase(0).options()
        rows = []
        for number in range(_WHITENING_CLIPS):
            batch = make_batch(library, options, self.config.seed, self.config.steps + number, 1)
            images, _ = self._tensors(batch)
            f16, _, _ = self.model.key_encoder.eval()(images[:, 0].contiguous())
            rows.append(f16[0].flatten(1).T.float())
        self.model.key_proj.whiten(torch.cat(rows))
        self._average_anew()

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to `last_lr` of the peak at the last step."""
        c = self.config
        if step < c.warmup:
            return c.lr * (step + 1) / c.warmup
        progress = (step - c.warmup) / max(1, c.steps - c.warmup)
        return c.lr * (c.last_lr + (1 - c.last_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))

    def step(self, step: int, batch: Batch) -> dict[str, float]:
        """Run one optimizer step on a batch; returns the values for the log."""
        config = self.config
        self._set_modes(step)
        images, labels = self._tensors(batch)
        objects = int(batch.objects.max())
        counts = torch.from_numpy(batch.objects).to(self.device)
        present = (torch.arange(objects, device=self.device)[None] < counts[:, None]).float()
        plan = draw_plan(
            np.random.default_rng((config.seed, step, 1 << 20)), images.shape[1], config.deep_update
        )
        aged = config.aged(step)
        fraction = hardest_fraction(step, config.hard_start, config.hard_end, config.hard_fraction)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.bf16):
            outputs = unroll(self.model, images, one_hot(labels[:, 0], objects), present, plan, aged)
        labels = labels[:, aged:]
        cross_entropy = images.new_zeros(())
        dice = images.new_zeros(())
        for t, logits in enumerate(outputs, 1):
            cross_entropy = cross_entropy + bootstrapped_cross_entropy(logits, labels[:, t], fraction)
            dice = dice + dice_loss(torch.softmax(logits, 1)[:, 1:], labels[:, t], present)
        loss = (cross_entropy + dice) / len(outputs)
        rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = float(
            nn.utils.clip_grad_norm_(
                [p for p in self.model.parameters() if p.requires_grad], config.grad_clip
            )
        )
        value = float(loss.detach())
        if not math.isfinite(value) or not math.isfinite(norm):
            # A single bad batch must not make the weights NaN; many in a row end the run (see `train`).
            log.warning("step %d: loss %s, gradient norm %s; step skipped", step, value, norm)
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self._update()
            self._average(step)
        result = {
            "loss": value,
            "ce": float(cross_entropy.detach()) / len(outputs),
            "dice": float(dice.detach()) / len(outputs),
            "grad": norm,
            "lr": rate,
        }
        # Counting pixels takes a twentieth of a step; every fifth step is enough for the log.
        if step % 5 == 0:
            result.update(self._agreement(outputs, labels, batch))
        return result

    @torch.no_grad()
    def _update(self) -> None:
        """Run the optimizer, with steps smaller by `feature_scale` for weights that multiply the trunk's
        features.

        Adam moves every weight by about the learning rate, whatever its input; for inputs with a deviation of
        6 the step is six times too large.
        """
        before = [(w, w[:, :n].clone()) for w, n in self._on_features]
        self.optimizer.step()
        for weight, old in before:
            part = weight[:, : old.shape[1]]
            part.copy_(old + (part - old) / self.config.feature_scale)

    @staticmethod
    def _agreement(outputs: list[Tensor], labels: Tensor, batch: Batch) -> dict[str, float]:
        iou = [
            mean_iou(logits[b].detach().argmax(0), labels[b, t], int(batch.objects[b]))
            for t, logits in enumerate(outputs, 1)
            for b in range(len(labels))
        ]
        result = {"iou": float(np.mean(iou))}
        by_clip = np.array(iou).reshape(len(outputs), -1).mean(0)
        for kind in sorted(set(batch.kinds)):
            result[f"iou_{kind}"] = float(by_clip[[k == kind for k in batch.kinds]].mean())
        return result

    def _tensors(self, batch: Batch) -> tuple[Tensor, Tensor]:
        frames = torch.from_numpy(batch.frames).to(self.device).permute(0, 1, 4, 2, 3).float()
        mean = torch.tensor(IMAGE_MEAN, device=self.device).view(3, 1, 1) * 255
        std = torch.tensor(IMAGE_STD, device=self.device).view(3, 1, 1) * 255
        return (frames - mean) / std, torch.from_numpy(batch.labels).to(self.device).long()

    def _set_modes(self, step: int) -> None:
        self.model.train()
        # ImageNet's statistics are kept: batches of composed pictures give no better estimate.
        self.model.key_encoder.eval()
        if step >= self.config.first_frozen_step():
            self.model.value_encoder.eval()

    @torch.no_grad()
    def _average(self, step: int) -> None:
        # Warm-up: otherwise the average would keep the random start for thousands of steps.
        keep = min(self.config.ema, (step + 1) / (step + 10))
        # Frozen statistics are those the weights are trained with from then on, so they are not averaged.
        frozen = step >= self.config.first_frozen_step()
        for name, now in self.model.state_dict().items():
            if now.is_floating_point() and not (frozen and is_statistic(name)):
                self.averaged[name].lerp_(now, 1 - keep)
            else:
                self.averaged[name].copy_(now)


def train(
    config: TrainConfig,
    data_root: str | Path,
    out_dir: str | Path,
    resume: bool = True,
    init: str | Path | Sequence[str | Path] | None = None,
    backbone: str | Path | None = None,
) -> Path:
    """Train a model and return the path of the averaged weights (fp16 safetensors).

    `out_dir` gets config.json, log.jsonl (a line every `log_every` steps), loss.png, checkpoint-<step>/ (the
    newest two) and weights-ema.safetensors. `resume` continues from the newest undamaged checkpoint in
    `out_dir` and ignores `init` and `backbone`. SIGTERM, SIGINT and `max_hours` end the run with a
    checkpoint; a second SIGINT ends it at once.

    Raises:
        FileNotFoundError: no pictures under `data_root`; nothing was written.
        ValueError: all checkpoints are damaged, or the checkpoint or `init` belongs to another model.
        RuntimeError: the loss was not finite for 20 steps in a row.
    """
    out = Path(out_dir)
    torch.set_num_threads(config.threads)
    library = Library(data_root, config.held_out_people)  # fails before anything is written
    resume = resume and latest_checkpoint(out) is not None
    trainer = Trainer(config, None if resume or init is not None else backbone)
    first = 0
    if resume:
        first = resume_from(out, trainer.model, trainer.averaged, trainer.optimizer, config)
    elif init is not None:
        trainer.use_weights(*([init] if isinstance(init, str | Path) else init))
    if not resume and config.whiten_keys:
        trainer.whiten_keys(library)
    out.mkdir(parents=True, exist_ok=True)
    if not resume:
        remove_checkpoints(out)
    trim_log(out / "log.jsonl", first)
    config.save(out / "config.json")

    def keep(done: int) -> None:
        save_checkpoint(out, done, trainer.model, trainer.averaged, trainer.optimizer, config)
        publish_weights(out / "weights-ema.safetensors", config.model, trainer.averaged)
        plot_losses(out / "log.jsonl", out / "loss.png")

    run_steps(config, out, first, batches(config, data_root, first, config.steps), trainer.step, keep)
    return out / "weights-ema.safetensors"
