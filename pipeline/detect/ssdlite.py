"""SSDLite on MobileNetV2 at 300 x 300 pixels, as TensorFlow's object detection API builds it, in torch.

Layers have TensorFlow's "SAME" padding, batch normalization is folded into the convolutions, and boxes are
coded and suppressed as in the frozen graph, so that results equal those of TensorFlow up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.detect.boxes import suppressed
from xmem_core.fused import FusedConv2d, can_fuse

SIDE = 300
"""Height and width of the network's input, in pixels."""

# MobileNetV2: output channels, blocks and first stride of each stage; expansion is 6 except in the first one.
_STAGES = ((16, 1, 1), (24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))
_LAST = 1280
# Channels of the extra feature maps, and of the 1 x 1 convolution before each.
_EXTRAS = ((256, 512), (128, 256), (128, 256), (64, 128))
# Height and width of the feature maps, and channels.
_GRIDS = (19, 10, 5, 3, 2, 1)
_CHANNELS = (576, 1280, 512, 256, 256, 128)
_SCALES = (0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0)
_EPSILON = 0.001  # of batch normalization


class _Conv(nn.Conv2d):
    """Convolution with "SAME" padding and a bias, into which batch normalization is folded."""

    def __init__(
        self, source: int, target: int, kernel: int = 1, stride: int = 1, groups: int = 1, relu6: bool = True
    ) -> None:
        super().__init__(source, target, kernel, stride, kernel // 2, groups=groups)
        self.requires_grad_(False)
        self.relu6 = relu6

    def forward(self, features: Tensor) -> Tensor:
        """B x C x H x W to B x C' x ceil(H / stride) x ceil(W / stride)."""
        padding = self.padding
        # Of maps of even size, TensorFlow pads the right and below only.
        if self.stride == (2, 2) and features.shape[-1] % 2 == 0:
            features, padding = F.pad(features, (0, 1, 0, 1)), (0, 0)
        out = F.conv2d(features, self.weight, self.bias, self.stride, padding, groups=self.groups)
        return F.relu6(out, inplace=True) if self.relu6 else out


class _Block(nn.Module):
    """Inverted residual: expansion, depthwise convolution, projection."""

    def __init__(self, source: int, target: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = source * expansion
        self.expand = _Conv(source, inner) if expansion > 1 else None
        self.depthwise = _Conv(inner, inner, 3, stride, groups=inner)
        self.project = _Conv(inner, target, relu6=False)
        self._adds = stride == 1 and source == target

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output, and its expanded features."""
        expanded = features if self.expand is None else self.expand(features)
        out = self.project(self.depthwise(expanded))
        return (out + features if self._adds else out), expanded


class _Head(nn.Module):
    """Boxes or class logits of a feature map."""

    def __init__(self, source: int, target: int) -> None:
        super().__init__()
        self.depthwise = _Conv(source, source, 3, groups=source)
        self.project = _Conv(source, target, relu6=False)

    def forward(self, features: Tensor, values: int, turned: bool = False) -> Tensor:
        """B x C x H x W to B x (H W anchors) x values; `turned`: the features are turned by 180 degrees."""
        out: Tensor = self.project(self.depthwise(features))
        if turned:
            out = out.flip(2, 3)
        return out.permute(0, 2, 3, 1).reshape(features.shape[0], -1, values)


class SSDLite(nn.Module):
    """Network of the pedestrian detector: one class besides the background.

    `forward` takes B x 3 x 300 x 300 float32 RGB from -1 to 1 and gives boxes, B x 1917 x 4 (top, left,
    bottom, right as shares of the picture), and scores of persons, B x 1917.

    Attributes:
        stem_dtype: precision that pictures are converted to.
        turned: whether the convolutions are those of a picture turned by 180 degrees, see `for_inference`.
    """

    anchors: Tensor
    stem_dtype = torch.float32
    turned = False

    def __init__(self) -> None:
        super().__init__()
        self.stem: nn.Module = _Conv(3, 32, 3, 2)
        blocks, source = [], 32
        for stage, (target, count, stride) in enumerate(_STAGES):
            for at in range(count):
                blocks.append(_Block(source, target, stride if at == 0 else 1, 1 if stage == 0 else 6))
                source = target
        self.blocks = nn.ModuleList(blocks)
        self.last = _Conv(source, _LAST)
        extras, source = [], _LAST
        for inner, target in _EXTRAS:
            extras.append(
                nn.Sequential(
                    _Conv(source, inner), _Conv(inner, inner, 3, 2, groups=inner), _Conv(inner, target)
                )
            )
            source = target
        self.extras = nn.ModuleList(extras)
        counts = [3] + [6] * 5
        self.boxes = nn.ModuleList(_Head(c, 4 * n) for c, n in zip(_CHANNELS, counts, strict=True))
        self.classes = nn.ModuleList(_Head(c, 2 * n) for c, n in zip(_CHANNELS, counts, strict=True))
        self.register_buffer("anchors", torch.from_numpy(anchors()), persistent=False)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        pictures = pictures.to(self.stem_dtype)
        if self.turned:
            pictures = pictures.flip(2, 3)
        maps = self._feature_maps(pictures)
        codes = torch.cat([head(m, 4, self.turned) for head, m in zip(self.boxes, maps, strict=True)], 1)
        logits = torch.cat([head(m, 2, self.turned) for head, m in zip(self.classes, maps, strict=True)], 1)
        return decoded(codes.float(), self.anchors), logits[..., 1].float().sigmoid()

    def _feature_maps(self, pictures: Tensor) -> list[Tensor]:
        features, maps = self.stem(pictures), []
        for at, block in enumerate(self.blocks):
            features, expanded = block(features)
            if at == 13:  # the last one of stride 16
                maps.append(expanded)
        maps.append(self.last(features))
        for extra in self.extras:
            maps.append(extra(maps[-1]))
        return maps


def for_inference(network: SSDLite, dtype: torch.dtype) -> SSDLite:
    """The network with faster convolutions, in the given precision; boxes and scores stay float32.

    TensorFlow pads maps of even size on the right and below only, which costs a copy of the map for operators
    that pad all sides alike. On the turned picture, with turned kernels, the padding is on the left and
    above, and what is padded on the right and below is never read. So this network is turned.

    Without PyTorch's fused operators, the same network.

    Args:
        network: in evaluation mode, used by nobody else meanwhile; not changed.
        dtype: float32 or bfloat16.
    """
    if not can_fuse(dtype):
        return network
    fast = SSDLite().eval()
    fast.load_state_dict(network.state_dict())
    fast.stem_dtype = dtype
    fast.turned = True
    sizes = _input_sizes(network)
    for path, module in [(p, m) for p, m in fast.named_modules() if not isinstance(m, _Conv)]:
        for name, conv in list(module.named_children()):
            if isinstance(conv, _Conv):
                conv.weight.data = conv.weight.flip(2, 3)
                conv = conv.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
                activation = "relu6" if conv.relu6 else None
                size = sizes[f"{path}.{name}" if path else name]
                setattr(module, name, FusedConv2d(conv, activation, laid_out_for=size))
    return fast


def _input_sizes(network: SSDLite) -> dict[str, tuple[int, int]]:
    """Height and width of each convolution's input, by its name, when the network runs."""
    sizes: dict[str, tuple[int, int]] = {}

    def note(name: str, features: Tensor) -> None:
        sizes[name] = (features.shape[2], features.shape[3])

    # Not of tensors of the device "meta", whose operators take a second to be imported.
    hooks = [
        module.register_forward_pre_hook(lambda _, given, name=name: note(name, given[0]))
        for name, module in network.named_modules()
        if isinstance(module, _Conv)
    ]
    try:
        with torch.inference_mode():
            network(torch.zeros(1, 3, SIDE, SIDE))
    finally:
        for hook in hooks:
            hook.remove()
    return sizes


def anchors() -> NDArray[np.float32]:
    """1917 x 4: top, left, height and width of the anchors, as shares of the picture."""
    found = []
    for layer, grid in enumerate(_GRIDS):
        if layer == 0:
            shapes = [(0.1, 1.0), (0.2, 2.0), (0.2, 0.5)]
        else:
            scale, following = _SCALES[layer], _SCALES[layer + 1]
            shapes = [(scale, ratio) for ratio in (1.0, 2.0, 0.5, 3.0, 0.3333)]
            shapes.append((float(np.sqrt(scale * following)), 1.0))
        scales, ratios = np.asarray(shapes, np.float32).T
        heights, widths = scales / np.sqrt(ratios), scales * np.sqrt(ratios)
        centres = (np.arange(grid, dtype=np.float32) + np.float32(0.5)) / np.float32(grid)
        y, x = np.meshgrid(centres, centres, indexing="ij")
        y, x = y.reshape(-1, 1), x.reshape(-1, 1)
        h, w = (
            np.broadcast_to(heights, (grid**2, len(shapes))),
            np.broadcast_to(widths, (grid**2, len(shapes))),
        )
        found.append(np.stack((y - h / 2, x - w / 2, h, w), -1).reshape(-1, 4))
    return np.concatenate(found).astype(np.float32)


def decoded(codes: Tensor, anchors: Tensor) -> Tensor:
    """Box codes to boxes: ... x N x 4 each, see `SSDLite` and `anchors`."""
    y, x, h, w = codes.unbind(-1)
    top, left, height, width = anchors.unbind(-1)
    y, x = y / 10 * height + top + height / 2, x / 10 * width + left + width / 2
    h, w = (h / 5).exp() * height, (w / 5).exp() * width
    return torch.stack((y - h / 2, x - w / 2, y + h / 2, x + w / 2), -1)


def picture_tensor(picture: NDArray[np.uint8]) -> Tensor:
    """H x W x 3 RGB to the network's input, 1 x 3 x 300 x 300 float32, resized bilinearly."""
    resized = cv2.resize(picture, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR)
    values = torch.from_numpy(np.asarray(resized)).permute(2, 0, 1)[None].float()
    return (values * (2 / 255) - 1).contiguous(memory_format=torch.channels_last)


def people_in(
    network: SSDLite, picture: NDArray[np.uint8], least: float = 1e-8
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Detections in a picture, as the frozen graph gives them, best first and at most 100.

    Args:
        network: with weights.
        picture: H x W x 3 uint8 RGB.
        least: smallest score.

    Returns:
        N x 4 float32 boxes (top, left, bottom, right as shares of the picture, cut at its edge); N scores.
    """
    return people_in_each(network, [picture], least)[0]


def people_in_each(
    network: SSDLite, pictures: Sequence[NDArray[np.uint8]], least: float = 1e-8
) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Like `people_in`, of several pictures at once; the pictures may differ in size."""
    with torch.inference_mode():
        batch = torch.cat([picture_tensor(picture) for picture in pictures])
        found, sure = network(batch.contiguous(memory_format=torch.channels_last))
    return [
        _likely(boxes, scores, least)
        for boxes, scores in zip(found.cpu().numpy(), sure.cpu().numpy(), strict=True)
    ]


def _likely(
    boxes: NDArray[np.float32], scores: NDArray[np.float32], least: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    likely = np.flatnonzero(scores > least)
    boxes, scores = boxes[likely], scores[likely]
    kept = suppressed(boxes, scores, iou=0.6, most=100)
    return np.clip(boxes[kept], 0, 1), scores[kept]


def folded_weights(constants: Mapping[str, NDArray[np.float32]]) -> dict[str, Tensor]:
    """The network's state dict from the constants of the frozen graph.

    Raises:
        ValueError: a constant is missing or of another shape: the graph is of another network.
    """
    network = SSDLite()
    return {
        f"{name}.{kind}": tensor
        for name, module in network.named_modules()
        if isinstance(module, _Conv)
        for kind, tensor in _folded(constants, _in_graph(name), module).items()
    }


def _in_graph(name: str) -> str:
    """The graph's name of a layer; ends with "depthwise" where its weights are called depthwise_weights."""
    base = "FeatureExtractor/MobilenetV2/"
    parts = name.split(".")
    if parts[0] == "stem":
        return base + "Conv"
    if parts[0] == "last":
        return base + "Conv_1"
    at = int(parts[1])
    if parts[0] == "blocks":
        return base + ("expanded_conv" if at == 0 else f"expanded_conv_{at}") + "/" + parts[2]
    if parts[0] == "extras":
        inner, target = _EXTRAS[at]
        if parts[2] == "0":
            return f"{base}layer_19_1_Conv2d_{at + 2}_1x1_{inner}"
        return f"{base}layer_19_2_Conv2d_{at + 2}_3x3_s2_{target}" + ("_depthwise" if parts[2] == "1" else "")
    head = {"boxes": "BoxEncodingPredictor", "classes": "ClassPredictor"}[parts[0]]
    return f"BoxPredictor_{at}/{head}" + ("_depthwise" if parts[2] == "depthwise" else "")


def _folded(constants: Mapping[str, NDArray[np.float32]], layer: str, module: _Conv) -> dict[str, Tensor]:
    depthwise = layer.endswith("depthwise")
    try:
        weight = constants[f"{layer}/{'depthwise_weights' if depthwise else 'weights'}"].astype(np.float64)
        # From height, width, channels, 1 or height, width, in, out.
        weight = weight.transpose(2, 3, 0, 1) if depthwise else weight.transpose(3, 2, 0, 1)
        bias: NDArray[np.float64]
        if f"{layer}/biases" in constants:
            bias = constants[f"{layer}/biases"].astype(np.float64)
        else:
            norm = [
                constants[f"{layer}/BatchNorm/{each}"].astype(np.float64)
                for each in ("gamma", "beta", "moving_mean", "moving_variance")
            ]
            gain = norm[0] / np.sqrt(norm[3] + _EPSILON)
            weight = weight * gain[:, None, None, None]
            bias = norm[1] - norm[2] * gain
    except KeyError as error:
        raise ValueError(f"the graph has no constant {error.args[0]}: it is of another network") from error
    folded = {"weight": torch.from_numpy(weight).float(), "bias": torch.from_numpy(bias).float()}
    for kind, tensor in folded.items():
        expected = cast(Tensor, getattr(module, kind)).shape
        if tensor.shape != expected:
            raise ValueError(f"{layer}: {kind} of shape {tuple(tensor.shape)}, not {tuple(expected)}")
        folded[kind] = tensor.contiguous()
    return folded
