"""Initial weights of the published network: ResNet-50 and ResNet-18 from ImageNet, by torchvision's names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.base.errors import UsageError
from xmem_core.backbones import ResNet50Trunk
from xmem_core.network import XMem


def load_resnets(model: XMem, paths: Sequence[str | Path]) -> None:
    """Load ResNet-50 into the key encoder and ResNet-18 into the value encoder.

    The value encoder's channels for masks, which ImageNet has not, keep their random start.

    Args:
        model: a network of the published shape.
        paths: files of torchvision (`resnet50-*.pth`, `resnet18-*.pth`), in any order.

    Raises:
        UsageError: a file is neither, or does not fit the model.
    """
    for path in paths:
        try:
            state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
            bottleneck = "layer1.0.conv3.weight" in state
        except Exception as error:  # whatever torch raises for what is no checkpoint
            first = str(error).strip().splitlines() or [type(error).__name__]
            raise UsageError(f"{path} is no checkpoint of a ResNet: {first[0]}") from None
        if bottleneck and not isinstance(model.key_encoder, ResNet50Trunk):
            raise UsageError(f"{path} is a ResNet-50; the key encoder is {model.config.key_backbone}")
        target: nn.Module = model.key_encoder if bottleneck else model.value_encoder
        own = target.state_dict()
        taken = {}
        for name, value in state.items():
            name = name.replace("layer1.", "res2.", 1) if bottleneck and name.startswith("layer1.") else name
            if name in own:
                taken[name] = value
        if "conv1.weight" in taken and not bottleneck:
            stem = own["conv1.weight"].clone()
            stem[:, :3] = taken["conv1.weight"]
            taken["conv1.weight"] = stem
        trunk = {n for n in own if n.startswith(("conv1.", "bn1.", "res2.", "layer1.", "layer2.", "layer3."))}
        wrong = sorted(n for n in trunk if n not in taken or taken[n].shape != own[n].shape)
        if wrong:
            raise UsageError(f"{path} does not fit the model: {wrong[0]} is missing or of another shape")
        target.load_state_dict(taken, strict=False)
