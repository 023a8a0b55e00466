"""ClickNet: a small network that turns clicks into a mask, with the backbone of xmem-lite.

The image is encoded once (`encode`); each further click runs only the rest of the trunk, from stride 8 on,
and the decoder. Clicks and the mask so far enter at stride 8, before the trunk's last six blocks, and once
more in the decoder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmem_core.backbones import EfficientNetLite0Trunk, fold_batch_norms
from xmem_core.weight_files import BUNDLED_CLICKS, WeightsError
from xmem_core.weights import load_weights, read_weights

Features = tuple[Tensor, Tensor, Tensor]
"""Features of an image at strides 2, 4 and 8."""

# The image-only part of the trunk ends after this block, at stride 8.
_IMAGE_BLOCKS = 5
# Channels of the trunk at stride 2.
_STRIDE_2 = 16
_MAPS = 5


@dataclass(frozen=True)
class ClickConfig:
    """Widths of a ClickNet.

    Args:
        dims: decoder channels at strides 16, 8, 4 and 2.
        click_dims: channels of the clicks' maps at strides 2, 4 and 8.
        heads: attention heads at stride 16.
        attention_blocks: attention blocks at stride 16.
        disc: radius of the disc drawn around a click, in pixels of the input.
        spread: standard deviation of the wide map around a click, in pixels of the input.
        size: longer side of the input that the network was trained for, in pixels.
    """

    dims: tuple[int, int, int, int] = (128, 80, 40, 16)
    click_dims: tuple[int, int, int] = (16, 24, 40)
    heads: int = 4
    attention_blocks: int = 2
    disc: float = 5.0
    spread: float = 24.0
    size: int = 320

    def __post_init__(self) -> None:
        for name, count in (("dims", 4), ("click_dims", 3)):
            value = tuple(getattr(self, name))
            object.__setattr__(self, name, value)
            if len(value) != count or min(value) < 1:
                raise ValueError(f"{name}={value!r} is not allowed: {count} numbers of at least 1")
        if self.heads < 1 or self.dims[0] % self.heads:
            raise ValueError(f"heads={self.heads!r} is not allowed: a divisor of {self.dims[0]}")
        if self.size < 32 or self.disc <= 0 or self.spread <= 0 or self.attention_blocks < 0:
            raise ValueError(
                "size must be at least 32, disc and spread more than 0, attention_blocks 0 or more"
            )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict that `from_dict` takes back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ClickConfig:
        """Build from `to_dict`'s output. Raises ValueError on an unknown name."""
        if unknown := sorted(set(values) - set(cls.__dataclass_fields__)):
            raise ValueError(f"unknown setting {', '.join(unknown)} of a click model")
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**known)


class _ConvNorm(nn.Module):
    """3x3 convolution, BatchNorm, ReLU."""

    def __init__(self, in_dim: int, dim: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_dim, dim, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn1(self.conv1(x)))


class _Residual(nn.Module):
    """Two 3x3 convolutions with BatchNorm, added to the input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(out)))


class _Attention(nn.Module):
    """Self-attention over all positions, then two linear layers; both residual and normalised before."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.widen = nn.Linear(dim, 2 * dim)
        self.narrow = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim) -> the same."""
        b, n, dim = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, dim)
        x = x + self.out(read)
        out: Tensor = x + self.narrow(torch.relu(self.widen(self.norm2(x))))
        return out


class ClickNet(nn.Module):
    """Segments what clicks point at. Inputs are multiples of 16 pixels in height and width."""

    def __init__(self, config: ClickConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ClickConfig()
        d16, d8, d4, d2 = config.dims
        c2, c4, c8 = config.click_dims
        self.trunk = EfficientNetLite0Trunk()
        t16, t8, t4 = self.trunk.channels
        self.click2 = _ConvNorm(_MAPS, c2)
        self.click4 = _ConvNorm(c2, c4, 2)
        self.click8 = _ConvNorm(c4, c8, 2)
        self.inject = nn.Conv2d(c8, t8, 1)
        # The trunk begins as it was trained, undisturbed by clicks.
        nn.init.zeros_(self.inject.weight)
        nn.init.zeros_(self.inject.bias)  # type: ignore[arg-type]
        self.in16 = nn.Conv2d(t16, d16, 1)
        self.clicks16 = nn.Conv2d(c8, d16, 3, 2, 1)
        self.attention = nn.ModuleList(_Attention(d16, config.heads) for _ in range(config.attention_blocks))
        self.block16 = _Residual(d16)
        self.up8 = nn.Conv2d(d16, d8, 1)
        self.skip8 = nn.Conv2d(t8 + c8, d8, 1)
        self.block8 = _Residual(d8)
        self.up4 = nn.Conv2d(d8, d4, 1)
        self.skip4 = nn.Conv2d(t4 + c4, d4, 1)
        self.block4 = _Residual(d4)
        self.up2 = nn.Conv2d(d4, d2, 1)
        self.skip2 = nn.Conv2d(_STRIDE_2, d2, 1)
        self.more2 = nn.Conv2d(c2, d2, 1, bias=False)
        self.block2 = _ConvNorm(d2, d2)
        self.predict = nn.Conv2d(d2, 1, 1)

    def image_stages(self) -> list[nn.Module]:
        """The modules that see the image only."""
        return [self.trunk.conv_stem, self.trunk.bn0, *list(self.trunk.blocks)[:_IMAGE_BLOCKS]]

    def encode(self, image: Tensor) -> Features:
        """(B, 3, H, W), normalised -> features at strides 2, 4 and 8."""
        trunk = self.trunk
        x = F.relu6(trunk.bn0(trunk.conv_stem(image)))
        f2 = x = trunk.blocks[0](x)
        for block in trunk.blocks[1:3]:
            x = block(x)
        f4 = x
        for block in trunk.blocks[3:_IMAGE_BLOCKS]:
            x = block(x)
        return f2, f4, x

    def forward(self, features: Features, maps: Tensor) -> Tensor:
        """Logits of the mask.

        Args:
            features: of `encode`.
            maps: (B, 5, H/2, W/2), of `click_maps`.

        Returns:
            (B, 1, H/2, W/2)
        """
        f2, f4, f8 = features
        c2 = self.click2(maps)
        c4 = self.click4(c2)
        c8 = self.click8(c4)
        x = f8 + self.inject(c8)
        for block in self.trunk.blocks[_IMAGE_BLOCKS:]:
            x = block(x)
        g = self.in16(x) + self.clicks16(c8)
        tokens = g.flatten(2).transpose(1, 2)
        for attention in self.attention:
            tokens = attention(tokens)
        g = self.block16(tokens.transpose(1, 2).reshape(g.shape))
        g = self.block8(_twice(self.up8(g)) + self.skip8(torch.cat([f8, c8], 1)))
        g = self.block4(_twice(self.up4(g)) + self.skip4(torch.cat([f4, c4], 1)))
        g = self.block2(torch.relu(_twice(self.up2(g)) + self.skip2(f2) + self.more2(c2)))
        logits: Tensor = self.predict(g)
        return logits


def _twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def click_maps(
    clicks: Sequence[Sequence[tuple[float, float, bool]]], previous: Tensor, config: ClickConfig
) -> Tensor:
    """What the network sees of clicks: a disc and a wide map for each sign, and the mask so far.

    Args:
        clicks: for each image of the batch (x, y, positive), in pixels of the network's input.
        previous: (B, 1, H/2, W/2), probabilities of the mask so far, or zeros.
        config: the network's.

    Returns:
        (B, 5, H/2, W/2)
    """
    b, _, h, w = previous.shape
    maps = previous.new_zeros(b, _MAPS, h, w)
    maps[:, 4:] = previous
    columns = torch.arange(w, dtype=torch.float32) * 2 + 0.5
    rows = torch.arange(h, dtype=torch.float32) * 2 + 0.5
    for row, points in zip(maps, clicks, strict=True):
        for channel, sign in ((0, True), (1, False)):
            own = torch.tensor([(x, y) for x, y, positive in points if positive == sign])
            if not len(own):
                continue
            square = (
                ((columns[None, :] - own[:, :1]) ** 2)[:, None, :]
                + ((rows[None, :] - own[:, 1:]) ** 2)[:, :, None]
            ).amin(0)
            row[channel] = (square <= config.disc**2).to(row.dtype)
            row[channel + 2] = torch.exp(-square / (2 * config.spread**2)).to(row.dtype)
    return maps


def load_click_weights(model: ClickNet, path: str | os.PathLike[str]) -> None:
    """Load a safetensors file into the model.

    Raises:
        WeightsError: it can't be read or belongs to another network.
    """
    state, _ = read_weights(Path(path))
    load_weights(model, state, os.fspath(path))


def load_click_model(path: str | os.PathLike[str] | None = None) -> ClickNet:
    """Load a click model for inference.

    Args:
        path: safetensors of `xmem train`. None: the bundled model.

    Returns:
        the model in eval mode, on the CPU, with its BatchNorms folded.

    Raises:
        WeightsError: the file is missing, damaged or belongs to another network.
    """
    where = BUNDLED_CLICKS if path is None else Path(path)
    if not where.is_file():
        raise WeightsError(f"no click model at {where}: reinstall the package, or give a .safetensors file")
    state, metadata = read_weights(where)
    try:
        config = ClickConfig.from_dict(json.loads(metadata["config"]))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise WeightsError(f"{where} is no click model: {error}") from error
    model = ClickNet(config)
    load_weights(model, state, str(where))
    model.requires_grad_(False)
    return fold_batch_norms(model.eval()).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
