"""Trunks of the two encoders. State-dict names are the published ones; nothing here downloads anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from xmem_core.aside import in_parts
from xmem_core.blocks import conv_shared

_M = TypeVar("_M", bound=nn.Module)

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions (He et al. 2016, figure 5 left)."""

    def __init__(self, in_dim: int, dim: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_dim, dim, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(dim)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_dim != dim:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_dim, dim, 1, stride, bias=False), nn.BatchNorm2d(dim)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu_(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        return torch.relu_(out.add_(shortcut))


class Bottleneck(nn.Module):
    """Residual block 1x1, 3x3, 1x1 with four times the width at its end; the 3x3 carries the stride."""

    expansion = 4

    def __init__(self, in_dim: int, dim: int, stride: int) -> None:
        super().__init__()
        out_dim = dim * self.expansion
        self.conv1 = nn.Conv2d(in_dim, dim, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(dim)
        self.conv3 = nn.Conv2d(dim, out_dim, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_dim)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_dim != out_dim:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_dim, out_dim, 1, stride, bias=False), nn.BatchNorm2d(out_dim)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu_(self.bn1(self.conv1(x)))
        out = torch.relu_(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        return torch.relu_(out.add_(shortcut))


def _stage(
    block: type[BasicBlock] | type[Bottleneck], in_dim: int, dim: int, count: int, stride: int
) -> nn.Sequential:
    out_dim = dim * getattr(block, "expansion", 1)
    layers = [block(in_dim, dim, stride)]
    layers += [block(out_dim, dim, 1) for _ in range(count - 1)]
    return nn.Sequential(*layers)


class ResNet50Trunk(nn.Module):
    """ResNet-50 up to stride 16, without its last stage."""

    channels = (1024, 512, 256)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.res2 = _stage(Bottleneck, 64, 64, 3, 1)
        self.layer2 = _stage(Bottleneck, 256, 128, 4, 2)
        self.layer3 = _stage(Bottleneck, 512, 256, 6, 2)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, H, W) -> features at strides 16, 8 and 4."""
        x = self.maxpool(torch.relu_(self.bn1(self.conv1(image))))
        f4 = self.res2(x)  # B, 256, H/4, W/4
        f8 = self.layer2(f4)  # B, 512, H/8, W/8
        f16 = self.layer3(f8)  # B, 1024, H/16, W/16
        return f16, f8, f4


class ResNet18Trunk(nn.Module):
    """ResNet-18 up to stride 16, without its last stage."""

    channels = (256, 128, 64)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.res2 = _stage(BasicBlock, 64, 64, 2, 1)
        self.layer2 = _stage(BasicBlock, 64, 128, 2, 2)
        self.layer3 = _stage(BasicBlock, 128, 256, 2, 2)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, H, W) -> features at strides 16, 8 and 4."""
        x = self.maxpool(torch.relu_(self.bn1(self.conv1(image))))
        f4 = self.res2(x)  # B, 64, H/4, W/4
        f8 = self.layer2(f4)  # B, 128, H/8, W/8
        f16 = self.layer3(f8)  # B, 256, H/16, W/16
        return f16, f8, f4


class MaskTrunk(nn.Module):
    """Trunk of value and mask encoders: residual stages over image, this object's mask and the others'.

    With stem 64, widths (64, 128, 256) and two blocks each it is ResNet-18 without its last stage.
    """

    def __init__(self, stem: int, widths: tuple[int, int, int], blocks: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(5, stem, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = _stage(BasicBlock, stem, widths[0], blocks[0], 1)
        self.layer2 = _stage(BasicBlock, widths[0], widths[1], blocks[1], 2)
        self.layer3 = _stage(BasicBlock, widths[1], widths[2], blocks[2], 2)

    def forward(self, image: Tensor, masks: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """image (B, 3, H, W), masks (B, O, 2, H, W): own, others -> (B, O, widths[2], H/16, W/16).

        `counts`: see `xmem_core.blocks`.
        """
        x = conv_shared(self.conv1, image, masks, counts).flatten(0, 1)
        out = in_parts(self._after_stem, x)
        return out.view(*masks.shape[:2], *out.shape[1:])

    def _after_stem(self, x: Tensor) -> Tensor:
        # Pooling comes before the ReLU in the published order; the two commute.
        x = torch.relu_(self.maxpool(self.bn1(x)))
        out: Tensor = self.layer3(self.layer2(self.layer1(x)))
        return out


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise k x k, project 1x1, with ReLU6 (MobileNetV2's block, no squeeze-excite)."""

    def __init__(self, in_dim: int, out_dim: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        mid = in_dim * expand
        self.expand_conv: nn.Module | None = None
        if expand != 1:
            self.expand_conv = nn.Conv2d(in_dim, mid, 1, bias=False)
            self.bn0 = nn.BatchNorm2d(mid, eps=1e-3)
        self.depthwise_conv = nn.Conv2d(mid, mid, kernel, stride, kernel // 2, groups=mid, bias=False)
        self.bn1 = nn.BatchNorm2d(mid, eps=1e-3)
        self.project_conv = nn.Conv2d(mid, out_dim, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_dim, eps=1e-3)
        self.residual = stride == 1 and in_dim == out_dim

    def forward(self, x: Tensor) -> Tensor:
        out = x
        if self.expand_conv is not None:
            out = nn.functional.relu6(self.bn0(self.expand_conv(out)), inplace=True)
        out = nn.functional.relu6(self.bn1(self.depthwise_conv(out)), inplace=True)
        out = self.bn2(self.project_conv(out))
        return torch.add(x, out) if self.residual else out


class EfficientNetLite0Trunk(nn.Module):
    """EfficientNet-Lite0 up to stride 16 (its blocks 0 to 10), without the stride-32 stages."""

    channels = (112, 40, 24)
    # (out channels, kernel, stride, expansion) of each block
    _BLOCKS = (
        (16, 3, 1, 1),
        (24, 3, 2, 6),
        (24, 3, 1, 6),
        (40, 5, 2, 6),
        (40, 5, 1, 6),
        (80, 3, 2, 6),
        (80, 3, 1, 6),
        (80, 3, 1, 6),
        (112, 5, 1, 6),
        (112, 5, 1, 6),
        (112, 5, 1, 6),
    )
    # the last block at strides 4, 8 and 16
    taps = (2, 4, 10)

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = nn.Conv2d(3, 32, 3, 2, 1, bias=False)
        self.bn0 = nn.BatchNorm2d(32, eps=1e-3)
        blocks: list[nn.Module] = []
        in_dim = 32
        for out_dim, kernel, stride, expand in self._BLOCKS:
            blocks.append(InvertedResidual(in_dim, out_dim, kernel, stride, expand))
            in_dim = out_dim
        self.blocks = nn.ModuleList(blocks)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, H, W) -> features at strides 16, 8 and 4."""
        x = nn.functional.relu6(self.bn0(self.conv_stem(image)), inplace=True)
        taps = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.taps:
                taps.append(x)
        f4, f8, f16 = taps  # 24, 40 and 112 channels
        return f16, f8, f4

    def stages_to_stride_4(self) -> list[nn.Module]:
        """The modules up to stride 4, which training may keep frozen at their ImageNet weights."""
        return [self.conv_stem, self.bn0, *list(self.blocks)[: self.taps[0] + 1]]

    def load_imagenet(self, state: Mapping[str, Tensor]) -> None:
        """Load the ImageNet classifier's weights, without its head.

        The classifier saw images scaled by (x - 127) / 128; ours are scaled by ImageNet's mean and deviation.
        The difference is linear, so it goes into the first convolution and the mean its BatchNorm subtracts.

        Args:
            state: the classifier's state dict, with names such as `_blocks.3._bn1.weight`.
        """
        renamed = {k.removeprefix("_").replace("._", "."): v for k, v in state.items()}
        own = self.state_dict()
        missing = sorted(set(own) - set(renamed))
        if missing:
            raise ValueError(f"not an EfficientNet-Lite0 checkpoint: it lacks {', '.join(missing[:3])}")
        picked = {name: renamed[name].clone() for name in own}
        weight = picked["conv_stem.weight"]
        std = torch.tensor(IMAGE_STD).view(1, 3, 1, 1)
        mean = torch.tensor(IMAGE_MEAN).view(1, 3, 1, 1)
        shift = (weight * (mean * 255 - 127) / 128).sum((1, 2, 3))
        picked["conv_stem.weight"] = weight * std * 255 / 128
        picked["bn0.running_mean"] = picked["bn0.running_mean"] - shift
        self.load_state_dict(picked)


def key_trunk(name: str) -> ResNet50Trunk | EfficientNetLite0Trunk:
    """The key encoder's trunk by its configured name."""
    return ResNet50Trunk() if name == "resnet50" else EfficientNetLite0Trunk()


def pixel_trunk(name: str) -> ResNet50Trunk | ResNet18Trunk:
    """Cutie's pixel encoder by its configured name."""
    return ResNet50Trunk() if name == "resnet50" else ResNet18Trunk()


# A convolution and the BatchNorm that follows it, by attribute name.
_NORMALISED = (
    ("conv1", "bn1"),
    ("conv2", "bn2"),
    ("conv3", "bn3"),
    ("conv_stem", "bn0"),
    ("expand_conv", "bn0"),
    ("depthwise_conv", "bn1"),
    ("project_conv", "bn2"),
    ("0", "1"),
)


def fold_batch_norms(module: _M) -> _M:
    """Fold every BatchNorm into the preceding convolution, in place: same function, fewer memory passes.

    Only for inference: the running statistics are constants then. The state dict's names change.
    """
    for parent in module.modules():
        for conv_name, norm_name in _NORMALISED:
            conv, norm = getattr(parent, conv_name, None), getattr(parent, norm_name, None)
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                assert norm.running_mean is not None
                assert norm.running_var is not None
                statistics = norm.running_mean, norm.running_var, norm.eps
                # Not `fuse_conv_bn_eval`, which copies the convolution first.
                conv.weight, conv.bias = fuse_conv_bn_weights(
                    conv.weight, conv.bias, *statistics, norm.weight, norm.bias
                )
                setattr(parent, norm_name, nn.Identity())
    return module
