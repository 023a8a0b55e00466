"""Training stages one after another, each from the weights of the one before."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.evaluation import davis
from jobs.evaluation.data_sets import find_data_set
from jobs.training.loop import WEIGHTS, Validate, train_stage
from jobs.training.processes import joined
from jobs.training.settings import StageConfig
from pipeline.base.errors import UsageError
from xmem_core import VideoSegmenter
from xmem_core.network import XMem

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageRun:
    """What to train with, beside the stages' settings.

    Args:
        init: weights that the first stage starts from; a name or path for `load_model`.
        backbones: torchvision's ResNet-50 and ResNet-18, if not `init`.
        resume: continue what is in the output folder.
        max_hours: checkpoint and stop after so long; 0: no limit.
        validation: a data set for `xmem evaluate`, scored while training; None: none is.
        validation_split: which of its lists.
    """

    init: str | None = None
    backbones: tuple[str, ...] = ()
    resume: bool = True
    max_hours: float = 0.0
    validation: str | None = None
    validation_split: str | None = None


def train_stages(
    configs: Sequence[StageConfig], data_root: str | Path, out: str | Path, run: StageRun
) -> Path | None:
    """Train stages in OUT/stage-<n>, each starting from the last one's weights; finished ones are skipped.

    In a process of `torchrun`, trains with the others.

    Returns:
        The weights of the last stage; None if the training was stopped before its end.

    Raises:
        UsageError: settings, data, weights or a checkpoint that cannot be used.
        XmemError: the training failed.
    """
    if not configs:
        raise UsageError("no stage to train")
    if any(each.model != configs[0].model for each in configs):
        raise UsageError("the stages have models of different shapes: none can start from another's weights")
    validate = None
    if run.validation is not None:
        find_data_set(run.validation, split=run.validation_split)  # refused now, not after hours
        validate = _validation(run.validation, run.validation_split)
    init: str | Path | None = run.init
    weights = None
    with joined(configs[0].device) as group:
        for number, config in enumerate(configs):
            folder = Path(out) / f"stage-{config.stage}"
            weights = folder / WEIGHTS
            _check_folder(folder, config, run.resume)
            finished = group.mean([float(run.resume and weights.exists())])[0] == 1
            group.wait()  # before the first process may write them
            if finished:
                if group.first:
                    log.info("stage %s is finished: %s", config.stage, weights)
            elif not train_stage(
                config,
                data_root,
                folder,
                group,
                init=init,
                backbones=run.backbones if number == 0 else (),
                resume=run.resume,
                max_hours=run.max_hours,
                validate=validate,
            ):
                return None
            init = weights
    return weights


def _check_folder(folder: Path, config: StageConfig, resume: bool) -> None:
    """Refuse a folder that holds a run of another stage."""
    path = folder / "config.json"
    if not resume or not path.exists():
        return
    try:
        there = StageConfig.load(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not of a training stage ({error}): use another output folder") from error
    if there.stage != config.stage or there.model != config.model:
        what = f"stage {there.stage}" if there.stage != config.stage else "a model of another shape"
        raise UsageError(
            f"{folder} holds a run of {what}, not of this stage {config.stage}: use another output folder, "
            "or --fresh to start over"
        )


def _validation(root: str, split: str | None) -> Validate:
    def validate(model: XMem) -> dict[str, float]:
        own = copy.deepcopy(model).eval()  # a segmenter may fold layers
        segmenter = VideoSegmenter(own, size=own.config.default_size)
        overall: dict[str, Any] = davis.run(root, segmenter, split=split).to_json()["overall"]
        return {name: float(value) for name, value in overall.items()}

    return validate


def with_overrides(configs: Sequence[StageConfig], overrides: dict[str, Any]) -> list[StageConfig]:
    """Configurations with settings of the command line. UsageError if one is not allowed."""
    try:
        return [each.with_overrides(overrides) for each in configs]
    except (ValueError, TypeError) as error:
        raise UsageError(f"training settings: {error}") from error
