"""Training of the click model: rounds of simulated clicks on each batch, each corrected by the next.

A step depends only on the settings, the weights and the step number, so a run resumed from a checkpoint
continues as if it had never stopped.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmem_core.backbones import IMAGE_MEAN, IMAGE_STD
from xmem_core.clicks import ClickNet, click_maps, load_click_weights
from xmem_core.training.clicks.samples import ClickLibrary, Mask, Sample, draw_sample
from xmem_core.training.clicks.settings import ClickTrainConfig
from xmem_core.training.clicks.simulated import Point, first_clicks, next_click, spoilt
from xmem_core.training.keep import (
    latest_checkpoint,
    plot_losses,
    publish_weights,
    remove_checkpoints,
    resume_from,
    save_checkpoint,
    trim_log,
)
from xmem_core.training.loop import run_steps
from xmem_core.training.speed import full_precision
from xmem_core.weights import mean_state

log = logging.getLogger(__name__)

Batch = list[Sample]

# Shares of samples that begin with a mask to correct; that click no further before the next round; and whose
# next round sees all clicks, but not the mask so far.
_CORRECTED, _UNCHANGED, _AFRESH = 0.15, 0.12, 0.13


class ClickTrainer:
    """Network, averaged weights and optimizer of a run. `step` updates all three with one batch."""

    def __init__(self, config: ClickTrainConfig, backbone: str | Path | None = None) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.device = torch.device(config.device)
        model = ClickNet(config.model)
        if backbone is not None:
            model.trunk.load_imagenet(torch.load(backbone, map_location="cpu", weights_only=True))
        self.model: ClickNet = model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        fixed = {id(m) for stage in self.model.image_stages() for m in stage.modules()}
        for stage in self.model.image_stages():
            stage.requires_grad_(False)
        if self.device.type == "cpu" and config.bf16:
            for module in self.model.modules():
                if isinstance(module, nn.Conv2d) and module.groups > 1 and id(module) not in fixed:
                    full_precision(module)
        self.optimizer = torch.optim.AdamW(self._groups(), lr=config.lr, betas=(0.9, 0.999))
        self._average_anew()

    def _average_anew(self) -> None:
        self.averaged = {name: t.detach().clone() for name, t in self.model.state_dict().items()}

    def _groups(self) -> list[dict[str, Any]]:
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((name.startswith("trunk."), parameter.ndim > 1), []).append(parameter)
        return [
            {
                "params": parameters,
                "factor": self.config.trunk_lr if trunk else 1.0,
                "weight_decay": self.config.weight_decay if decays else 0.0,
            }
            for (trunk, decays), parameters in sorted(groups.items())
        ]

    def use_weights(self, *paths: str | Path) -> None:
        """Start from a weights file, or the mean of several. ValueError if one does not fit the model."""
        states = []
        for path in paths:
            load_click_weights(self.model, path)
            states.append({name: t.clone() for name, t in self.model.state_dict().items()})
        self.model.load_state_dict(mean_state(states))
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
        self.model.train()
        # ImageNet's statistics are kept: small batches give no better estimate.
        self.model.trunk.eval()
        if step >= config.freeze_norm * config.steps:
            self.model.eval()
        rng = np.random.default_rng((config.seed, step, 1 << 20))
        shares = np.array(config.phase(step).passes)
        rounds = 1 + int(rng.choice(len(shares), p=shares / shares.sum()))
        truth = torch.from_numpy(np.stack([s.mask for s in batch]))[:, None].float().to(self.device)
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=config.bf16):
            features = self.model.encode(images_of(batch).to(self.device))
        clicks, base = _begin(batch, rng)
        previous = base
        self.optimizer.zero_grad(set_to_none=True)
        result: dict[str, float] = {}
        losses: list[float] = []
        for number in range(rounds):
            maps = click_maps(clicks, previous, config.model).to(self.device)
            maps = maps.contiguous(memory_format=torch.channels_last)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.bf16):
                logits = self.model(features, maps)
            logits = F.interpolate(logits.float(), scale_factor=2, mode="bilinear", align_corners=False)
            loss, cross_entropy, dice = _loss(logits, truth)
            (loss / rounds).backward()
            losses.append(float(loss.detach()))
            predicted = logits.detach() > 0
            result[f"iou_{number + 1}"] = float(_iou(predicted, truth > 0.5).mean())
            if number + 1 < rounds:
                shown = torch.sigmoid(F.avg_pool2d(logits.detach(), 2)).cpu()
                previous = _click_on(clicks, predicted[:, 0].cpu().numpy(), shown, base, batch, rng)
            result |= {"ce": cross_entropy, "dice": dice}
        rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        trained = [p for p in self.model.parameters() if p.requires_grad]
        norm = float(nn.utils.clip_grad_norm_(trained, config.grad_clip))
        value = float(np.mean(losses))
        if not math.isfinite(value) or not math.isfinite(norm):
            log.warning("step %d: loss %s, gradient norm %s; step skipped", step, value, norm)
        else:
            self.optimizer.step()
            self._average(step)
        return {"loss": value, "grad": norm, "lr": rate, **result}

    @torch.no_grad()
    def _average(self, step: int) -> None:
        # Warm-up: otherwise the average would keep the random start for thousands of steps.
        keep = min(self.config.ema, (step + 1) / (step + 10))
        for name, now in self.model.state_dict().items():
            if now.is_floating_point():
                self.averaged[name].lerp_(now, 1 - keep)
            else:
                self.averaged[name].copy_(now)


def images_of(batch: Batch) -> Tensor:
    """The pictures of a batch, normalised: (B, 3, S, S)."""
    frames = torch.from_numpy(np.stack([s.picture for s in batch])).permute(0, 3, 1, 2).float()
    mean = torch.tensor(IMAGE_MEAN).view(3, 1, 1) * 255
    std = torch.tensor(IMAGE_STD).view(3, 1, 1) * 255
    return ((frames - mean) / std).contiguous(memory_format=torch.channels_last)


def _begin(batch: Batch, rng: np.random.Generator) -> tuple[list[list[Point]], Tensor]:
    """The first clicks of each sample and the masks that they correct, (B, 1, S/2, S/2)."""
    size = len(batch[0].mask) // 2
    base = torch.zeros(len(batch), 1, size, size)
    clicks: list[list[Point]] = []
    for number, sample in enumerate(batch):
        if rng.random() < _CORRECTED:
            mask = spoilt(sample.mask, rng)
            click = next_click(mask, sample.mask, rng)
            base[number] = F.avg_pool2d(torch.from_numpy(mask)[None].float(), 2)
            clicks.append([click] if click is not None else [])
        else:
            clicks.append(first_clicks(sample.mask, rng))
    return clicks, base


def _click_on(
    clicks: list[list[Point]],
    predicted: Mask,
    shown: Tensor,
    base: Tensor,
    batch: Batch,
    rng: np.random.Generator,
) -> Tensor:
    """Add a click to each sample, in place; returns the masks that the next round sees."""
    previous = shown.clone()
    for number, sample in enumerate(batch):
        draw = rng.random()
        if draw >= _UNCHANGED:
            click = next_click(predicted[number], sample.mask, rng)
            clicks[number] = [*clicks[number], *([click] if click is not None else [])]
        if draw >= 1 - _AFRESH:
            previous[number] = base[number]
    return previous


def _loss(logits: Tensor, truth: Tensor) -> tuple[Tensor, float, float]:
    cross_entropy = F.binary_cross_entropy_with_logits(logits, truth)
    p = torch.sigmoid(logits)
    both = (p * truth).flatten(1).sum(1)
    dice = (1 - (2 * both + 1) / (p.flatten(1).sum(1) + truth.flatten(1).sum(1) + 1)).mean()
    return cross_entropy + dice, float(cross_entropy.detach()), float(dice.detach())


def _iou(predicted: Tensor, truth: Tensor) -> Tensor:
    both = (predicted & truth).flatten(1).sum(1)
    return both / (predicted | truth).flatten(1).sum(1).clamp(min=1)


def batches(library: ClickLibrary, config: ClickTrainConfig, first: int) -> Iterator[Batch]:
    """The batches of the steps from `first` on. They depend only on the seed and the step."""
    for step in range(first, config.steps):
        phase = config.phase(step)
        yield [
            draw_sample(
                library, phase.size, np.random.default_rng((config.seed, step, number)), phase.mixture
            )
            for number in range(phase.batch)
        ]


def train(
    config: ClickTrainConfig,
    data_root: str | Path,
    out_dir: str | Path,
    resume: bool = True,
    init: str | Path | Sequence[str | Path] | None = None,
    backbone: str | Path | None = None,
) -> Path:
    """Train a click model and return the path of the averaged weights (fp16 safetensors).

    `out_dir` gets config.json, log.jsonl (a line every `log_every` steps), loss.png, checkpoint-<step>/ (the
    newest two) and weights-ema.safetensors. `resume` continues from the newest undamaged checkpoint in
    `out_dir` and ignores `init` and `backbone`. SIGTERM, SIGINT and `max_hours` end the run with a
    checkpoint.

    Raises:
        FileNotFoundError: no pictures under `data_root`; nothing was written.
        ValueError: all checkpoints are damaged, or the checkpoint or `init` belongs to another model.
        RuntimeError: the loss was not finite for 20 steps in a row.
    """
    out = Path(out_dir)
    torch.set_num_threads(config.threads)
    library = ClickLibrary(data_root)  # fails before anything is written
    resume = resume and latest_checkpoint(out) is not None
    trainer = ClickTrainer(config, None if resume or init is not None else backbone)
    first = 0
    if resume:
        first = resume_from(out, trainer.model, trainer.averaged, trainer.optimizer, config)
    elif init is not None:
        trainer.use_weights(*([init] if isinstance(init, str | Path) else init))
    out.mkdir(parents=True, exist_ok=True)
    if not resume:
        remove_checkpoints(out)
    trim_log(out / "log.jsonl", first)
    config.save(out / "config.json")

    def keep(done: int) -> None:
        save_checkpoint(out, done, trainer.model, trainer.averaged, trainer.optimizer, config)
        publish_weights(out / "weights-ema.safetensors", config.model, trainer.averaged)
        plot_losses(out / "log.jsonl", out / "loss.png")

    run_steps(config, out, first, batches(library, config, first), trainer.step, keep)
    return out / "weights-ema.safetensors"
