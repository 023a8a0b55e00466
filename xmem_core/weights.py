"""Loading and writing weights.

Nothing is ever unpickled: `.pth` files load with `weights_only=True`, ours are safetensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from xmem_core.config import AnyModelConfig, CutieConfig, ModelConfig
from xmem_core.cutie import Cutie
from xmem_core.fingerprint import file_identity, note_source
from xmem_core.network import XMem
from xmem_core.weight_files import Progress, WeightsError, find_weights

# Maximum number of mismatching tensors that an error names.
_NAMED = 3


def load_model(
    name: str | os.PathLike[str] = "xmem-lite",
    device: torch.device | str = "cpu",
    *,
    progress: Progress | None = None,
) -> XMem | Cutie:
    """Load a model for inference.

    Args:
        name: `xmem-lite` (bundled); `xmem`, `xmem-s012`, `xmem-s2`, `xmem-no-sensory`, `cutie-base` or
            `cutie-small` (the published checkpoints, from the cache folder or downloaded into it); or a path,
            `.pth` or `.safetensors`. Which network a file is of follows from its tensors' names.
        device: device of the model's tensors.
        progress: called with the bytes received and expected during a download.

    Returns:
        the model in eval mode.

    Raises:
        WeightsError: no such model or file, a failed download, or a file that does not fit the network.
    """
    path = find_weights(name, progress=progress)
    identity = file_identity(path)
    state, metadata = read_weights(path)
    try:
        config = _config_of(json.loads(metadata["config"])) if "config" in metadata else infer_config(state)
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise WeightsError(f"{path}: {error}") from error
    model = build_network(config)
    load_weights(model, state, str(path))
    model = model.eval().to(device)
    note_source(model, path, identity)
    return model


def build_network(config: AnyModelConfig) -> XMem | Cutie:
    """The network of a configuration, with random weights."""
    return XMem(config) if isinstance(config, ModelConfig) else Cutie(config)


def _config_of(values: Any) -> AnyModelConfig:
    """The configuration that `save_weights` wrote; ValueError on an unknown name."""
    return (CutieConfig if values.get("family") == "cutie" else ModelConfig).from_dict(values)


def save_weights(
    model: XMem | Cutie, path: str | os.PathLike[str], dtype: torch.dtype = torch.float16
) -> None:
    """Write a model and its configuration as safetensors, atomically."""
    state = {
        name: (t.to(dtype) if t.is_floating_point() else t).detach().cpu().contiguous()
        for name, t in model.state_dict().items()
    }
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    safetensors.torch.save_file(state, part, {"config": json.dumps(model.config.to_dict(), sort_keys=True)})
    os.replace(part, target)


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict strictly.

    The first value convolution of a single-object checkpoint has no channel for the other objects; a channel
    of zeros is added, which gives the same results.

    Raises:
        WeightsError: names the first tensors that are missing, unknown or of another shape.
    """
    own = model.state_dict()
    given = dict(state)
    for stem in ("value_encoder.conv1.weight", "mask_encoder.conv1.weight"):
        if stem not in own or stem not in given or given[stem].ndim != 4:
            continue
        if given[stem].shape[1] == own[stem].shape[1] - 1:
            given[stem] = torch.cat([given[stem], torch.zeros_like(given[stem][:, :1])], 1)
    faults = [f"{n} is missing" for n in own if n not in given]
    faults += [f"{n} is unknown" for n in given if n not in own]
    faults += [
        f"{n} is {list(given[n].shape)}, not {list(own[n].shape)}"
        for n in own
        if n in given and given[n].shape != own[n].shape
    ]
    if faults:
        more = f" and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        raise WeightsError(
            f"{source} does not hold this network's weights: {'; '.join(faults[:_NAMED])}{more}"
        )
    model.load_state_dict(given)


def mean_state(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of state dicts of one network, in fp64; integer tensors are taken from the last one."""
    return {
        name: torch.stack([state[name].double() for state in states]).mean(0) if t.is_floating_point() else t
        for name, t in states[-1].items()
    }


def infer_config(state: Mapping[str, Tensor]) -> AnyModelConfig:
    """The configuration of a published checkpoint, from its tensors' names and shapes.

    Raises:
        ValueError: tensors that determine the configuration are missing.
    """
    if any(name.startswith("object_transformer.") for name in state):
        deep = "pixel_encoder.res2.0.conv3.weight" in state
        return CutieConfig() if deep else CutieConfig.small()
    try:
        hidden = state.get("decoder.hidden_update.transform.weight")
        return replace(
            ModelConfig(),
            key_dim=state["key_proj.key_proj.weight"].shape[0],
            value_dim=state["value_encoder.fuser.block2.conv2.weight"].shape[0],
            hidden_dim=0 if hidden is None else hidden.shape[0] // 3,
        )
    except KeyError as error:
        raise ValueError(f"not an XMem or Cutie checkpoint: it has no tensor {error}") from error


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors in fp32, and the metadata (empty for a `.pth`)."""
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = dict(file.metadata() or {})
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        else:
            metadata = {}
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load may raise any exception on a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(f"{path} cannot be read as weights: {reason}; get the file again") from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise WeightsError(f"{path} holds no state dict of tensors: it is not a checkpoint of XMem or Cutie")
    return {n: t.float() if t.is_floating_point() else t for n, t in state.items()}, metadata
