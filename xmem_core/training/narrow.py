"""Narrowing: initialises a narrower network from the strongest channels of a wider one."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from xmem_core.config import ModelConfig
from xmem_core.network import XMem

# What may be narrowed: the value encoder's trunk and the decoder. Keys, values and the sensory memory keep
# their widths and thus their learned representations.
_WIDTHS = ("value_stem", "value_widths", "decoder_dims")
# Usage of a network and properties of its weights, not its shape.
_USE = ("default_size", "default_small_size", "default_search_window", "default_least_area", "presence")

# Tensors by name, with the channels of their first and second dimension; None: not narrowed. Channels that
# are added to each other share a name, so that the same ones are kept. v: stages of the value encoder (v0:
# its stem), m: inside their blocks; d: scales of the decoder, f, u, gate: inside its blocks.
_CHANNELS: tuple[tuple[str, str | None, str | None], ...] = (
    (r"value_encoder\.(?:conv1|bn1)\..*", "v0", None),
    (r"value_encoder\.layer1\.0\.conv1\.weight", "m1", "v0"),
    (r"value_encoder\.layer2\.0\.conv1\.weight", "m2", "v1"),
    (r"value_encoder\.layer3\.0\.conv1\.weight", "m3", "v2"),
    (r"value_encoder\.layer1\.0\.downsample\..*", "v1", "v0"),
    (r"value_encoder\.layer2\.0\.downsample\..*", "v2", "v1"),
    (r"value_encoder\.layer3\.0\.downsample\..*", "v3", "v2"),
    (r"value_encoder\.layer(\d)\.\d+\.(?:conv1|bn1)\..*", r"m\1", r"v\1"),
    (r"value_encoder\.layer(\d)\.\d+\.(?:conv2|bn2)\..*", r"v\1", r"m\1"),
    (r"value_encoder\.fuser\.block1\.(?:conv1|downsample)\.weight", None, "v3"),
    (r"decoder\.fuser\.block1\.conv1\..*", "f1", None),
    (r"decoder\.fuser\.block1\.downsample\..*", "d16", None),
    (r"decoder\.fuser\.block(\d)\.conv2\..*", "d16", r"f\1"),
    (r"decoder\.fuser\.block2\.conv1\..*", "f2", "d16"),
    (r"decoder\.fuser\.attention\.ChannelGate\.mlp\.1\..*", "gate", "d16"),
    (r"decoder\.fuser\.attention\.ChannelGate\.mlp\.3\..*", "d16", "gate"),
    (r"decoder\.hidden_update\.g(16|8|4)_conv\.weight", None, r"d\1"),
    (r"decoder\.up_(16|8)_\d\.skip_conv\..*", r"d\1", None),
    (r"decoder\.up_16_8\.out_conv\.conv1\..*", "u8", "d16"),
    (r"decoder\.up_16_8\.out_conv\.conv2\..*", "d8", "u8"),
    (r"decoder\.up_16_8\.out_conv\.downsample\..*", "d8", "d16"),
    (r"decoder\.up_8_4\.out_conv\.conv1\..*", "u4", "d8"),
    (r"decoder\.up_8_4\.out_conv\.conv2\..*", "d4", "u4"),
    (r"decoder\.up_8_4\.out_conv\.downsample\..*", "d4", "d8"),
    (r"decoder\.pred\.weight", None, "d4"),
)
# Inputs with more channels than those named: here the named ones are the last, elsewhere the first.
_LAST = re.compile(r"value_encoder\.fuser\.block1\..*")


def narrow(state: Mapping[str, Tensor], wide: ModelConfig, config: ModelConfig) -> dict[str, Tensor]:
    """Make a state dict for a network of `config` from one of `wide`, for further training.

    Of each width, the channels with the largest weights are kept: by the product of the norms of the weights
    that write and read them.

    Args:
        state: state dict of the wide network.
        wide: its shape.
        config: a shape that differs only by a smaller `value_stem`, `value_widths` or `decoder_dims`.

    Raises:
        ValueError: the shapes differ in other values, or `config` is wider somewhere.
    """
    before, after = wide.to_dict(), config.to_dict()
    if other := sorted(n for n in before if before[n] != after[n] and n not in (*_WIDTHS, *_USE)):
        raise ValueError(
            f"weights of another {', '.join(other)} cannot be narrowed: only {', '.join(_WIDTHS)} may differ"
        )
    target = {name: tuple(t.shape) for name, t in XMem(config).state_dict().items()}
    if set(target) != set(state):
        raise ValueError("weights cannot be narrowed: value_stem equals value_widths[0] in only one of them")
    had, wanted = _sizes(wide), _sizes(config)
    if wider := sorted(n for n in had if wanted[n] > had[n]):
        raise ValueError(f"weights cannot be narrowed to more channels ({', '.join(wider)})")
    plan = {name: _channels_of(name, wide) for name in state}
    kept = _strongest(state, plan, had, wanted)
    return {name: _cut(name, tensor, plan[name], kept, had) for name, tensor in state.items()}


def _sizes(config: ModelConfig) -> dict[str, int]:
    d16, d8, d4 = config.decoder_dims
    stages = dict(enumerate(config.value_widths, 1))
    return {
        "v0": config.value_stem,
        **{f"v{n}": width for n, width in stages.items()},
        **{f"m{n}": width for n, width in stages.items()},
        **{"d16": d16, "f1": d16, "f2": d16, "gate": d16 // 16, "d8": d8, "u8": d8, "d4": d4, "u4": d4},
    }


def _channels_of(name: str, config: ModelConfig) -> list[str | None]:
    for pattern, *channels in _CHANNELS:
        if match := re.fullmatch(pattern, name):
            found = [None if c is None else match.expand(c) for c in channels]
            # Without a projection between them, the stem's channels are added to the first stage's.
            same = config.value_stem == config.value_widths[0]
            return ["v1" if same and c == "v0" else c for c in found]
    return [None, None]


def _offset(name: str, dim: int, tensor: Tensor, size: int) -> int:
    return tensor.shape[1] - size if dim == 1 and _LAST.fullmatch(name) else 0


def _strongest(
    state: Mapping[str, Tensor],
    plan: dict[str, list[str | None]],
    had: dict[str, int],
    wanted: dict[str, int],
) -> dict[str, Tensor]:
    """The channels to keep, by name."""
    strength = {name: [torch.zeros(n, dtype=torch.float64) for _ in range(2)] for name, n in had.items()}
    for name, tensor in state.items():
        if tensor.ndim < 2:
            continue
        for dim, channels in enumerate(plan[name]):
            if channels is not None:
                each = tensor.double().square().transpose(0, dim).flatten(1).sum(1)
                start = _offset(name, dim, tensor, had[channels])
                strength[channels][dim] += each[start : start + had[channels]]
    return {
        name: (written * read).topk(wanted[name]).indices.sort().values
        for name, (written, read) in strength.items()
    }


def _cut(
    name: str,
    tensor: Tensor,
    channels: list[str | None],
    kept: dict[str, Tensor],
    had: dict[str, int],
) -> Tensor:
    for dim, each in enumerate(channels[: tensor.ndim]):
        if each is None:
            continue
        start = _offset(name, dim, tensor, had[each])
        every = torch.arange(tensor.shape[dim])
        index = torch.cat([every[:start], start + kept[each], every[start + had[each] :]])
        tensor = tensor.index_select(dim, index)
    return tensor.clone()
