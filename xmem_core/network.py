"""The XMem network: key encoder, value encoder and decoder. Stateless; memory is passed in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmem_core.aside import each, helper
from xmem_core.backbones import EfficientNetLite0Trunk, MaskTrunk, key_trunk
from xmem_core.blocks import (
    FeatureFusion,
    GatedUpdate,
    SensoryUpdate,
    SplitConv2d,
    UpBlock,
    flattened,
    spread,
)
from xmem_core.config import ModelConfig

# Probabilities are clamped to [eps, 1 - eps] before the logit.
_EPS = 1e-7


@dataclass(frozen=True)
class KeyFeatures:
    """Output of the key encoder. h, w are H/16, W/16.

    Args:
        key: (B, C_k, h, w)
        shrinkage: (B, 1, h, w), at least 1
        selection: (B, C_k, h, w), in 0..1
        f16, f8, f4: trunk features at strides 16, 8 and 4
    """

    key: Tensor
    shrinkage: Tensor
    selection: Tensor
    f16: Tensor
    f8: Tensor
    f4: Tensor

    @property
    def scales(self) -> tuple[Tensor, Tensor, Tensor]:
        """(f16, f8, f4), as `XMem.decode` takes them."""
        return self.f16, self.f8, self.f4

    def at(self, row: int) -> KeyFeatures:
        """The features of one image of the batch, as a batch of one."""
        parts = (self.key, self.shrinkage, self.selection, self.f16, self.f8, self.f4)
        return KeyFeatures(*(t[row : row + 1] for t in parts))

    def __repr__(self) -> str:
        return f"KeyFeatures(key={tuple(self.key.shape)}, f16={tuple(self.f16.shape)})"


def aggregate(probabilities: Tensor) -> Tensor:
    """Soft aggregation of independent object probabilities into logits over background and objects.

    Args:
        probabilities: (B, O, H, W) in 0..1.

    Returns:
        (B, O + 1, H, W) logits, background first; their softmax over dim 1 sums to 1 at each pixel.

    Source: Oh et al. 2019 (STM), equation 4, as XMem uses it.
    """
    background = torch.prod(1 - probabilities, dim=1, keepdim=True)
    return torch.logit(torch.cat([background, probabilities], 1), _EPS)


class KeyProjection(nn.Module):
    """Key, shrinkage and selection from the stride-16 features (paper section 3.2.1, equation 4)."""

    def __init__(self, in_dim: int, key_dim: int) -> None:
        super().__init__()
        self.key_proj = nn.Conv2d(in_dim, key_dim, 3, padding=1)
        self.d_proj = nn.Conv2d(in_dim, 1, 3, padding=1)
        self.e_proj = nn.Conv2d(in_dim, key_dim, 3, padding=1)
        nn.init.orthogonal_(self.key_proj.weight)
        assert self.key_proj.bias is not None
        nn.init.zeros_(self.key_proj.bias)

    def forward(self, f16: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shrinkage = self.d_proj(f16) ** 2 + 1
        return self.key_proj(f16), shrinkage, torch.sigmoid(self.e_proj(f16))

    @torch.no_grad()
    def whiten(self, f16: Tensor) -> None:
        """Initialise keys as the features' principal components, scaled to variance 1.

        Similarity is a sum of squares over keys. With random projections of features as large as those of
        EfficientNet-Lite0 (deviation 6) it is so steep that each query reads one element, mostly the one of
        least shrinkage, and training does not recover. Shrinkage starts near 1, selection near 1/2.

        Args:
            f16: (N, C) stride-16 features at many positions of many images, N at least C.

        Raises:
            ValueError: fewer positions than channels, or fewer channels than C_k.
        """
        count, channels = f16.shape
        dim = self.key_proj.out_channels
        if count < channels or channels < dim:
            raise ValueError(f"features {tuple(f16.shape)}: need at least {channels} rows, and {dim} columns")
        mean = f16.mean(0)
        variances, axes = torch.linalg.eigh(torch.cov(f16.T))  # ascending
        # The small components are mostly noise: a floor on the variance limits their amplification.
        deviations = torch.sqrt(variances[-dim:] + 0.02 * variances.mean())
        weight = (axes[:, -dim:] / deviations).T
        assert self.key_proj.bias is not None
        self.key_proj.weight.zero_()
        self.key_proj.weight[:, :, 1, 1] = weight
        self.key_proj.bias.copy_(-(weight @ mean))
        for conv, wanted in ((self.d_proj, 0.3), (self.e_proj, 0.5)):
            assert conv.bias is not None
            middle = conv.weight.sum((2, 3))  # assumes nine equal neighbours
            out = (f16 - mean) @ middle.T
            conv.weight.mul_(wanted / out.std())
            conv.bias.copy_(-(conv.weight.sum((2, 3)) @ mean))


class ValueEncoder(MaskTrunk):
    """Encodes an image and an object's mask as that object's memory value."""

    def __init__(self, config: ModelConfig, f16_dim: int) -> None:
        super().__init__(config.value_stem, config.value_widths, config.value_blocks)
        self.fuser = FeatureFusion(f16_dim, config.value_widths[2], config.value_dim)
        if config.hidden_dim > 0:
            self.hidden_reinforce = GatedUpdate(config.value_dim, config.hidden_dim)


class Decoder(nn.Module):
    """Decodes readout and sensory memory into mask logits and the next sensory memory."""

    def __init__(self, config: ModelConfig, channels: tuple[int, int, int]) -> None:
        super().__init__()
        d16, d8, d4 = config.decoder_dims
        self.fuser = FeatureFusion(channels[0], config.value_dim + config.hidden_dim, d16)
        if config.hidden_dim > 0:
            self.hidden_update = SensoryUpdate(config.decoder_dims, config.sensory_mid_dim, config.hidden_dim)
        self.up_16_8 = UpBlock(channels[1], d16, d8)
        self.up_8_4 = UpBlock(channels[2], d8, d4)
        self.pred = nn.Conv2d(d4, 1, 3, padding=1)


class XMem(nn.Module):
    """XMem's network (Cheng & Schwing, ECCV 2022). `state_dict()` has the published names.

    Args:
        config: backbones and widths; the default is the published model's.
    """

    def __init__(self, config: ModelConfig | None = None) -> None:
        super().__init__()
        self.config = config or ModelConfig()
        self.exact_keys = False
        """Whether images are encoded outside of autocast, whose precision their weights do not have then."""
        self.key_encoder = key_trunk(self.config.key_backbone)
        channels = self.key_encoder.channels
        self.value_encoder = ValueEncoder(self.config, channels[0])
        self.key_proj = KeyProjection(channels[0], self.config.key_dim)
        self.decoder = Decoder(self.config, channels)

    def encode_key(self, image: Tensor) -> KeyFeatures:
        """Encode images (B, 3, H, W), normalised, H and W multiples of 16."""
        with torch.autocast(image.device.type, enabled=False) if self.exact_keys else nullcontext():
            f16, f8, f4 = self.key_encoder(image)
            key, shrinkage, selection = self.key_proj(f16)
        return KeyFeatures(key, shrinkage, selection, f16, f8, f4)

    def encode_value(
        self,
        image: Tensor,
        f16: Tensor,
        hidden: Tensor | None,
        masks: Tensor,
        *,
        deep_update: bool = True,
        counts: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Encode each object's memory value on a frame that enters memory.

        Args:
            image: (B, 3, H, W) normalised.
            f16: (B, C, h, w) of the same frame, from `encode_key`.
            hidden: (B, O, C_h, h, w), or None for a model without sensory memory.
            masks: (B, O, H, W) in 0..1.
            deep_update: update the sensory memory from the value.
            counts: number of objects of each image; what is theirs is then (N, 1, ...), see
                `xmem_core.blocks`. None: each image has O.

        Returns:
            value (B, O, C_v, h, w), and the sensory memory, updated or unchanged.
        """
        encoder = self.value_encoder
        if counts is not None:
            others = torch.cat([part.sum(0, keepdim=True) - part for part in masks.split(list(counts))])
        else:
            others = masks.sum(1, keepdim=True) - masks if masks.shape[1] > 1 else torch.zeros_like(masks)
        g = encoder(image, torch.stack([masks, others], 2), counts)
        value = encoder.fuser(f16, g, counts)
        if deep_update and hidden is not None:
            hidden = encoder.hidden_reinforce(value, hidden)
        return value, hidden

    def decode(
        self,
        scales: tuple[Tensor, Tensor, Tensor],
        readout: Tensor,
        hidden: Tensor | None,
        *,
        update_hidden: bool = True,
        counts: Sequence[int] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """Mask logits of every object.

        Args:
            scales: (f16, f8, f4) of the frame.
            readout: (B, O, C_v, h, w), read from memory.
            hidden: (B, O, C_h, h, w), or None for a model without sensory memory.
            update_hidden: also compute the next sensory memory.
            counts: as for `encode_value`.

        Returns:
            the next sensory memory (or `hidden` unchanged), and logits (B, O, H, W).
        """
        decoder = self.decoder
        f16, f8, f4 = scales
        b, o = readout.shape[:2]
        own = readout if hidden is None else torch.cat([readout, hidden], 2)
        g16 = decoder.fuser(f16, own, counts)
        skip8, skip4 = decoder.up_16_8.skip_conv(f8), decoder.up_8_4.skip_conv(f4)
        if counts is not None:
            skip8, skip4 = (spread(skip, counts).squeeze(1) for skip in (skip8, skip4))
        # On a CPU one object after the other, when tracking: their large maps then take the same memory, and
        # the system need not provide new memory for each operation.
        # Not where it is compiled: each would be compiled by itself.
        apart = g16.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()

        def upsampled(part: Tensor) -> tuple[Tensor, Tensor | None]:
            """Logits of some of the objects, and what their sensory memory is renewed from."""
            g8 = decoder.up_16_8.joined(skip8, part)
            g4 = flattened(decoder.up_8_4.joined(skip4, g8))
            logit = decoder.pred(torch.relu(g4))  # B*O, 1, H/4, W/4
            x = None
            if update_hidden and hidden is not None:
                x = decoder.hidden_update.summed(flattened(part), flattened(g8), g4, logit)
                x = x.unflatten(0, (b, -1))
            logits = F.interpolate(logit, scale_factor=4, mode="bilinear", align_corners=False)
            return logits.view(b, -1, *logits.shape[2:]), x

        parts = [partial(upsampled, part) for part in g16.split(1 if apart else o, 1)]
        done = each(parts, helper() if apart else None)
        found, summed = [logits for logits, _ in done], [x for _, x in done if x is not None]
        if hidden is not None and summed:
            hidden = decoder.hidden_update(torch.cat(summed, 1).flatten(0, 1), hidden)
        return hidden, torch.cat(found, 1)

    def weights_on_features(self) -> list[tuple[Tensor, int]]:
        """The weights that multiply the key encoder's features: (weight, input channels, the first)."""
        f16_dim = self.key_encoder.channels[0]
        projection, decoder = self.key_proj, self.decoder
        convs: list[tuple[nn.Module | None, int]] = [
            (conv, f16_dim) for conv in (projection.key_proj, projection.d_proj, projection.e_proj)
        ]
        for fuser in (self.value_encoder.fuser, decoder.fuser):
            convs += [(fuser.block1.conv1, f16_dim), (fuser.block1.downsample, f16_dim)]
        for up in (decoder.up_16_8, decoder.up_8_4):
            convs.append((up.skip_conv, up.skip_conv.in_channels))
        return [(conv.weight, n) for conv, n in convs if isinstance(conv, nn.Conv2d)]

    def split_shared(self) -> None:
        """Hold the convolutions of cat(shared, own) as two, in place: their weights are then not cut on every
        call. Only for inference: the state dict's names change.
        """
        f16_dim = self.key_encoder.channels[0]
        for fuser in (self.value_encoder.fuser, self.decoder.fuser):
            block = fuser.block1
            block.conv1 = SplitConv2d(block.conv1, f16_dim)  # type: ignore[assignment]
            if block.downsample is not None:
                block.downsample = SplitConv2d(block.downsample, f16_dim)  # type: ignore[assignment]
        encoder = self.value_encoder
        encoder.conv1 = SplitConv2d(encoder.conv1, 3)  # type: ignore[assignment]

    def load_backbone(self, path: str | Path) -> None:
        """Start the key encoder from an ImageNet EfficientNet-Lite0 checkpoint (for training).

        Raises:
            ValueError: this model's key encoder is another one, or the file holds other tensors.
        """
        if not isinstance(self.key_encoder, EfficientNetLite0Trunk):
            raise ValueError(f"key_backbone={self.config.key_backbone!r} has no ImageNet start here")
        state: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        self.key_encoder.load_imagenet(state)
