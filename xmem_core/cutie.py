"""The Cutie network: encoders, object summaries, object transformer and decoder. Stateless; memory is passed
in.

Source: Cheng, Oh, Price, Lee & Schwing, "Putting the Object Back into Video Object Segmentation" (CVPR 2024).
It reads pixel memory as XMem does; then object queries, started from each object's summaries, and the pixels
that were read exchange information in a transformer before the mask is decoded.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmem_core.backbones import MaskTrunk, pixel_trunk
from xmem_core.blocks import ChannelAttentionBlock, GatedUpdate, ResidualBlock, SensoryUpdate
from xmem_core.config import CutieConfig
from xmem_core.network import aggregate

# The positional encoding: coordinates of a map run from 0 to the scale; wavelengths from 2 pi to 256 pi.
_PE_SCALE, _PE_TEMPERATURE = 32.0, 128.0
_PE_EPS = 1e-6
# Keeps the mean feature of an object without area finite.
_AREA_EPS = 1e-4


@dataclass(frozen=True)
class PixelFeatures:
    """What an image gives, whatever its objects are. h, w are H/16, W/16.

    Args:
        key: (B, C_k, h, w)
        shrinkage: (B, 1, h, w), at least 1
        selection: (B, C_k, h, w), in 0..1
        p16: (B, C, h, w), read by the fusers
        s8, s4: (B, C, H/8, W/8) and (B, C_4, H/4, W/4), added by the decoder
    """

    key: Tensor
    shrinkage: Tensor
    selection: Tensor
    p16: Tensor
    s8: Tensor
    s4: Tensor

    def at(self, row: int) -> PixelFeatures:
        """The features of one image of the batch, as a batch of one."""
        return PixelFeatures(*(getattr(self, f.name)[row : row + 1] for f in fields(self)))

    def __repr__(self) -> str:
        return f"PixelFeatures(key={tuple(self.key.shape)}, p16={tuple(self.p16.shape)})"


class KeyProjection(nn.Module):
    """Key, shrinkage and selection from the stride-16 features, brought to C channels first."""

    def __init__(self, in_dim: int, dim: int, key_dim: int) -> None:
        super().__init__()
        self.pix_feat_proj = nn.Conv2d(in_dim, dim, 1)
        self.key_proj = nn.Conv2d(dim, key_dim, 3, padding=1)
        self.d_proj = nn.Conv2d(dim, 1, 3, padding=1)
        self.e_proj = nn.Conv2d(dim, key_dim, 3, padding=1)

    def forward(self, f16: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.pix_feat_proj(f16)
        return self.key_proj(x), self.d_proj(x) ** 2 + 1, torch.sigmoid(self.e_proj(x))


class _Distributor(nn.Module):
    """Adds an image's features to those of each of its objects, both through a 1x1 convolution."""

    def __init__(self, x_dim: int, g_dim: int, out_dim: int) -> None:
        super().__init__()
        self.x_transform = nn.Conv2d(x_dim, out_dim, 1)
        self.g_transform = nn.Conv2d(g_dim, out_dim, 1)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        """x (B, C_x, h, w), g (B, O, C_g, h, w) -> (B*O, out_dim, h, w)."""
        own = self.g_transform(g.flatten(0, 1)).view(*g.shape[:2], -1, *g.shape[3:])
        out: Tensor = self.x_transform(x).unsqueeze(1) + own
        return out.flatten(0, 1)


class Fuser(nn.Module):
    """Fuses an image's features with those of each of its objects."""

    def __init__(self, x_dim: int, g_dim: int, out_dim: int) -> None:
        super().__init__()
        self.distributor = _Distributor(x_dim, g_dim, out_dim)
        self.block1 = ChannelAttentionBlock(out_dim)
        self.block2 = ChannelAttentionBlock(out_dim)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        """x (B, C_x, h, w), g (B, O, C_g, h, w) -> (B, O, out_dim, h, w)."""
        out: Tensor = self.block2(self.block1(self.distributor(x, g)))
        return out.view(*g.shape[:2], *out.shape[1:])


class MaskEncoder(MaskTrunk):
    """Encodes an image and an object's mask as that object's memory value."""

    def __init__(self, config: CutieConfig) -> None:
        super().__init__(config.mask_stem, config.mask_widths, config.mask_blocks)
        self.fuser = Fuser(config.dim, config.mask_widths[2], config.dim)
        self.sensory_update = GatedUpdate(config.dim, config.dim)


class PositionalEncoding(nn.Module):
    """Sines and cosines of the coordinates: the first half of the channels of x, the second of y."""

    inv_freq: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = dim // 2
        inv_freq = 1.0 / _PE_TEMPERATURE ** (torch.arange(0, half, 2).float() / half)
        self.register_buffer("inv_freq", inv_freq)

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """The encoding of a map of h x w, (h * w, dim)."""
        waves = []
        for count in grid:
            place = torch.arange(count, device=self.inv_freq.device, dtype=self.inv_freq.dtype)
            angle = (_PE_SCALE * place / (count - 1 + _PE_EPS)).unsqueeze(1) * self.inv_freq
            waves.append(torch.stack([angle.sin(), angle.cos()], 2).flatten(1))  # interleaved
        of_y, of_x = waves
        h, w = grid
        whole = [of_x.unsqueeze(0).expand(h, w, -1), of_y.unsqueeze(1).expand(h, w, -1)]
        return torch.cat(whole, 2).flatten(0, 1)


class ObjectSummarizer(nn.Module):
    """Sums a memory value's features over parts of an object and of what surrounds it."""

    def __init__(self, config: CutieConfig) -> None:
        super().__init__()
        dim = config.dim
        self.queries = config.queries
        self.pos_enc = PositionalEncoding(dim)
        self.input_proj = nn.Linear(dim, dim)
        self.feature_pred = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.weights_pred = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, config.queries))

    def forward(self, value: Tensor, masks: Tensor) -> Tensor:
        """value (B, O, C, h, w), masks (B, O, h, w) in 0..1 -> sums and areas, (B, O, Q, C + 1)."""
        grid = (value.shape[3], value.shape[4])
        u = self.input_proj(value.flatten(3).mT) + self.pos_enc(grid)  # B, O, h * w, C
        features = self.feature_pred(u).float()
        inside = masks.flatten(2).unsqueeze(3)
        half = self.queries // 2
        seen = torch.cat([inside.expand(-1, -1, -1, half), (1 - inside).expand(-1, -1, -1, half)], 3)
        weights = torch.sigmoid(self.weights_pred(u).float()) * seen
        return torch.cat([weights.mT @ features, weights.sum(2).unsqueeze(3)], 3)


class PixelFuser(nn.Module):
    """Fuses what was read from memory with the sensory memory, the last masks and the image."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fuser = Fuser(dim, dim, dim)
        self.sensory_compress = nn.Conv2d(dim + 2, dim, 1)

    def forward(self, p16: Tensor, readout: Tensor, hidden: Tensor, masks: Tensor) -> Tensor:
        """p16 (B, C, h, w); readout, hidden (B, O, C, h, w); masks (B, O, h, w) -> (B, O, C, h, w)."""
        others = (masks.sum(1, keepdim=True) - masks).clamp(0, 1)
        sensed = torch.cat([hidden, masks.unsqueeze(2), others.unsqueeze(2)], 2)
        compressed = self.sensory_compress(sensed.flatten(0, 1)).view(readout.shape)
        out: Tensor = self.fuser(p16, readout + compressed)
        return out


class _CrossAttention(nn.Module):
    def __init__(self, dim: int, heads: int, *, norm: bool) -> None:
        super().__init__()
        self.cross_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(
        self, x: Tensor, memory: Tensor, x_emb: Tensor, memory_emb: Tensor, barred: Tensor | None = None
    ) -> Tensor:
        # The residual is the normalised x.
        x = self.norm(x)
        read, _ = self.cross_attn(
            x + x_emb, memory + memory_emb, memory, need_weights=False, attn_mask=barred
        )
        return torch.add(x, read)


class _SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, x_emb: Tensor) -> Tensor:
        x = self.norm(x)
        asking = x + x_emb
        read, _ = self.self_attn(asking, asking, x, need_weights=False)
        return torch.add(x, read)


class _FeedForward(nn.Module):
    def __init__(self, dim: int, wide: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, wide)
        self.linear2 = nn.Linear(wide, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.linear2(torch.relu_(self.linear1(self.norm(x)))))


class _PixelFeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = ChannelAttentionBlock(dim)

    def forward(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """(N, h * w, C) -> the same."""
        n, _, c = pixels.shape
        return torch.flatten(self.conv(pixels.mT.reshape(n, c, *grid)), 2).mT


class TransformerBlock(nn.Module):
    """Queries read from pixels, from each other, and pixels read from queries."""

    def __init__(self, config: CutieConfig) -> None:
        super().__init__()
        dim, heads = config.dim, config.heads
        self.read_from_pixel = _CrossAttention(dim, heads, norm=True)
        self.self_attn = _SelfAttention(dim, heads)
        self.ffn = _FeedForward(dim, config.ffn_dim)
        self.read_from_query = _CrossAttention(dim, heads, norm=False)
        self.pixel_ffn = _PixelFeedForward(dim)

    def forward(
        self,
        queries: Tensor,
        pixels: Tensor,
        query_emb: Tensor,
        pixel_emb: Tensor,
        barred: Tensor,
        grid: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """queries (N, Q, C), pixels (N, h * w, C), embeddings alike, barred (N * heads, Q, h * w) bool."""
        queries = self.read_from_pixel(queries, pixels, query_emb, pixel_emb, barred)
        queries = self.ffn(self.self_attn(queries, query_emb))
        pixels = self.read_from_query(pixels, queries, pixel_emb, query_emb)
        return queries, self.pixel_ffn(pixels, grid)


class ObjectTransformer(nn.Module):
    """Object queries refine the pixels that were read from memory (paper section 3.3)."""

    def __init__(self, config: CutieConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.heads
        self.query_init = nn.Embedding(config.queries, dim)
        self.query_emb = nn.Embedding(config.queries, dim)
        self.summary_to_query_init = nn.Linear(dim, dim)
        self.summary_to_query_emb = nn.Linear(dim, dim)
        self.pixel_init_proj = nn.Conv2d(dim, dim, 1)
        self.pixel_emb_proj = nn.Conv2d(dim, dim, 1)
        self.spatial_pe = PositionalEncoding(dim)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.transformer_blocks))
        # The last one follows the last block and is for training only.
        self.mask_pred = nn.ModuleList(
            nn.Sequential(nn.ReLU(), nn.Conv2d(dim, 1, 1)) for _ in range(config.transformer_blocks + 1)
        )

    def forward(self, pixels: Tensor, summaries: Tensor) -> Tensor:
        """pixels (B, O, C, h, w), summaries (B, O, Q, C + 1) -> (B, O, C, h, w)."""
        b, o, c, h, w = pixels.shape
        mean = summaries[..., :-1] / (summaries[..., -1:] + _AREA_EPS)
        mean = mean.flatten(0, 1)  # B * O, Q, C
        x = self.query_init.weight + self.summary_to_query_init(mean)
        x_emb = self.query_emb.weight + self.summary_to_query_emb(mean)
        flat = pixels.flatten(0, 1)
        z = self.pixel_init_proj(flat).flatten(2).mT  # B * O, h * w, C
        z_emb = self.spatial_pe((h, w)) + self.pixel_emb_proj(flat).flatten(2).mT
        for block, mask_pred in zip(self.blocks, self.mask_pred, strict=False):
            logits = mask_pred(z.mT.reshape(b * o, c, h, w))
            x, z = block(x, z, x_emb, z_emb, self._barred(logits.view(b, o, h, w), x.shape[1]), (h, w))
        out: Tensor = z.mT.reshape(b, o, c, h, w)
        return out

    def _barred(self, logits: Tensor, queries: int) -> Tensor:
        """Pixels that a query may not read, (B * O * heads, Q, h * w): the first half of the queries reads
        where the object is the most probable, the second half everywhere else.
        """
        planes = aggregate(torch.sigmoid(logits.float()))
        inside = (planes[:, 1:] >= planes.amax(1, keepdim=True)).flatten(0, 1).flatten(1)  # B * O, h * w
        # A query that would be left without pixels reads all of them.
        outside = inside & ~inside.all(1, keepdim=True)
        inside = ~inside & inside.any(1, keepdim=True)
        barred = torch.stack([inside, outside], 1).repeat_interleave(queries // 2, 1)
        return barred.repeat_interleave(self.heads, 0)


class _FeatureProjections(nn.Module):
    def __init__(self, in_dims: tuple[int, int], out_dims: tuple[int, int]) -> None:
        super().__init__()
        self.transforms = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(in_dims, out_dims, strict=True))


class _UpBlock(nn.Module):
    """Doubles the resolution and adds the image's features of that scale."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.out_conv = ResidualBlock(in_dim, out_dim, shortcut_kernel=1)

    def forward(self, skip: Tensor, g: Tensor) -> Tensor:
        """skip (B, in_dim, 2h, 2w), g (B, O, in_dim, h, w) -> (B, O, out_dim, 2h, 2w)."""
        b, o = g.shape[:2]
        up = F.interpolate(g.flatten(0, 1), scale_factor=2, mode="bilinear", align_corners=False)
        up = up.view(b, o, *up.shape[1:]) + skip.unsqueeze(1)
        out: Tensor = self.out_conv(up.flatten(0, 1))
        return out.view(b, o, *out.shape[1:])


class MaskDecoder(nn.Module):
    """Decodes the memory readout into mask logits at stride 4 and the next sensory memory."""

    def __init__(self, config: CutieConfig, channels: tuple[int, int, int]) -> None:
        super().__init__()
        d16 = config.dim
        d8, d4 = config.decoder_dims
        self.sensory_update = SensoryUpdate((d16, d8, d4), d16, d16)
        self.decoder_feat_proc = _FeatureProjections((channels[1], channels[2]), (d16, d8))
        self.up_16_8 = _UpBlock(d16, d8)
        self.up_8_4 = _UpBlock(d8, d4)
        self.pred = nn.Conv2d(d4, 1, 3, padding=1)


class _SensoryAux(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(dim, dim + 1, 1)


class _AuxComputer(nn.Module):
    """Heads of training's auxiliary losses; part of the published state dict, unused otherwise."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.sensory_aux = _SensoryAux(dim)


class Cutie(nn.Module):
    """Cutie's network (Cheng et al., CVPR 2024). `state_dict()` has the published names.

    Args:
        config: backbone and widths; the default is cutie-base's.
    """

    def __init__(self, config: CutieConfig | None = None) -> None:
        super().__init__()
        self.config = config or CutieConfig()
        dim = self.config.dim
        self.pixel_encoder = pixel_trunk(self.config.pixel_backbone)
        channels = self.pixel_encoder.channels
        self.pix_feat_proj = nn.Conv2d(channels[0], dim, 1)
        self.key_proj = KeyProjection(channels[0], dim, self.config.key_dim)
        self.mask_encoder = MaskEncoder(self.config)
        self.mask_decoder = MaskDecoder(self.config, channels)
        self.pixel_fuser = PixelFuser(dim)
        self.object_transformer = ObjectTransformer(self.config)
        self.object_summarizer = ObjectSummarizer(self.config)
        self.aux_computer = _AuxComputer(dim)

    def encode_key(self, image: Tensor) -> PixelFeatures:
        """Encode images (B, 3, H, W), normalised, H and W multiples of 16."""
        f16, f8, f4 = self.pixel_encoder(image)
        key, shrinkage, selection = self.key_proj(f16)
        of_8, of_4 = self.mask_decoder.decoder_feat_proc.transforms
        return PixelFeatures(key, shrinkage, selection, self.pix_feat_proj(f16), of_8(f8), of_4(f4))

    def encode_value(
        self, image: Tensor, p16: Tensor, hidden: Tensor, masks: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode each object's memory value and summary on a frame that enters memory.

        Args:
            image: (B, 3, H, W) normalised.
            p16: (B, C, h, w) of the same frame, from `encode_key`.
            hidden: (B, O, C, h, w)
            masks: (B, O, H, W) in 0..1.

        Returns:
            value (B, O, C, h, w), summaries (B, O, Q, C + 1) and the updated sensory memory.
        """
        others = (masks.sum(1, keepdim=True) - masks).clamp(0, 1)
        encoder = self.mask_encoder
        value = encoder.fuser(p16, encoder(image, torch.stack([masks, others], 2)))
        small = F.interpolate(masks, value.shape[3:], mode="area")
        return value, self.object_summarizer(value, small), encoder.sensory_update(value, hidden)

    def read_objects(
        self, p16: Tensor, readout: Tensor, hidden: Tensor, masks: Tensor, summaries: Tensor
    ) -> Tensor:
        """Refine what a group of objects read from its pixel memory.

        Args:
            p16: (B, C, h, w) of the frame.
            readout: (B, O, C, h, w), read from memory.
            hidden: (B, O, C, h, w)
            masks: (B, O, h, w), the objects' probabilities on the frame before.
            summaries: (B, O, Q, C + 1), accumulated over the memory frames.

        Returns:
            (B, O, C, h, w)
        """
        refined: Tensor = self.object_transformer(self.pixel_fuser(p16, readout, hidden, masks), summaries)
        return refined

    def decode(
        self, s8: Tensor, s4: Tensor, readout: Tensor, hidden: Tensor, *, update_hidden: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Mask logits of every object at stride 4.

        Args:
            s8, s4: of the frame.
            readout: (B, O, C, h, w), from `read_objects`.
            hidden: (B, O, C, h, w)
            update_hidden: also compute the next sensory memory.

        Returns:
            the next sensory memory (or `hidden` unchanged), and logits (B, O, H/4, W/4).
        """
        decoder = self.mask_decoder
        b, o = readout.shape[:2]
        g8 = decoder.up_16_8(s8, readout)
        g4 = decoder.up_8_4(s4, g8).flatten(0, 1)
        logit = decoder.pred(torch.relu(g4))  # B*O, 1, H/4, W/4
        if update_hidden:
            update = decoder.sensory_update
            hidden = update(update.summed(readout.flatten(0, 1), g8.flatten(0, 1), g4, logit), hidden)
        return hidden, logit.view(b, o, *logit.shape[2:])
