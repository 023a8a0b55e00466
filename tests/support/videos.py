"""Generated test videos: coloured shapes moving over a texture, in many containers and codecs.

`make_video` writes one; `truncate` and `corrupt` damage a copy of one. Everything is seeded, so a call with
the same arguments draws the same pictures.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]

_made: dict[str, bytes] = {}
"""Videos of this process, by all that they are made of: many tests make the same."""
_MOST_BYTES = 1 << 20

ENCODERS = {
    "h264": "libx264",
    "h264_rgb": "libx264rgb",
    "mpeg4": "mpeg4",
    "mpeg2": "mpeg2video",
    "vp8": "libvpx",
    "vp9": "libvpx-vp9",
    "mjpeg": "mjpeg",
    "ffv1": "ffv1",
    "hevc": "libx265",
}


@dataclass(frozen=True)
class Recipe:
    """Encoding options: codec, frame types, timestamps.

    `pts` are in units of `time_base`, one per frame; without them frame i has pts `start_pts + i * step`.
    `rotation` is the display matrix's angle in degrees, counter-clockwise, as FFmpeg counts it.
    """

    codec: str = "h264"
    rate: int = 25
    time_base: Fraction = Fraction(1, 25)
    start_pts: int = 0
    step: int = 1
    pts: Sequence[int] | None = None
    gop: int = 12
    b_frames: int = 0
    open_gop: bool = False
    pix_fmt: str = "yuv420p"
    rotation: int | None = None
    quality: int = 18
    options: dict[str, str] = field(default_factory=dict)
    container_options: dict[str, str] = field(default_factory=dict)


def scene(index: int, width: int = 160, height: int = 120) -> Image:
    """Picture `index`, H x W x 3 uint8 RGB: a red square, a green disc, a blue triangle, all moving."""
    rng = np.random.default_rng(7)
    coarse = rng.integers(60, 180, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    large = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    image: Image = np.roll(large, index // 2, axis=1).astype(np.uint8)
    side = max(4, min(width, height) // 5)
    x, y = shapes(index, width, height)["square"]
    cv2.rectangle(image, (x, y), (x + side - 1, y + side - 1), (230, 20, 20), -1)
    x, y = shapes(index, width, height)["disc"]
    cv2.circle(image, (x, y), side // 2, (20, 220, 20), -1)
    x, y = shapes(index, width, height)["triangle"]
    cv2.fillConvexPoly(image, np.array([[x, y], [x + side, y], [x, y + side]]), (20, 20, 240))
    return image


def shapes(index: int, width: int, height: int) -> dict[str, tuple[int, int]]:
    """Positions of the shapes in picture `index`, (x, y): upper left corners, and the disc's centre."""
    side = max(4, min(width, height) // 5)
    across, down = max(1, width - side), max(1, height - side)
    return {
        "square": (index * 3 % across, down // 4),
        "disc": (side + (index * 2 + width // 2) % max(1, width - 2 * side), down * 3 // 4),
        "triangle": (across // 2, index * 2 % down),
    }


def quadrants(width: int = 160, height: int = 120) -> Image:
    """A picture without symmetry: red and green above, blue and white below."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 2] = (255, 0, 0)
    image[: height // 2, width // 2 :] = (0, 255, 0)
    image[height // 2 :, : width // 2] = (0, 0, 255)
    image[height // 2 :, width // 2 :] = (255, 255, 255)
    return image


def make_video(
    path: str | Path,
    images: int | Sequence[Image] = 24,
    *,
    width: int = 160,
    height: int = 120,
    **recipe: Any,
) -> Path:
    """Write a video and return its path; the suffix selects the container, `recipe` has fields of `Recipe`.

    Args:
        path: output file; .mp4, .mkv, .avi, .ts, .webm, .mov, ...
        images: number of pictures of `scene`, or the pictures themselves (H x W x 3 uint8 RGB).
    """
    if not isinstance(images, int):
        return _encode(Path(path), images, **recipe)
    key = f"{Path(path).suffix} {images} {width} {height} {sorted(recipe.items())}"
    if key not in _made:
        made = _encode(Path(path), [scene(i, width, height) for i in range(images)], **recipe)
        if made.stat().st_size > _MOST_BYTES:
            return made
        _made[key] = made.read_bytes()
    Path(path).write_bytes(_made[key])
    return Path(path)


def _encode(path: Path, pictures: Sequence[Image], **recipe: Any) -> Path:
    plan = Recipe(**recipe)
    height, width = pictures[0].shape[:2]
    options = _encoder_options(plan)
    with av.open(str(path), "w", options=plan.container_options) as container:
        stream = container.add_stream(ENCODERS[plan.codec], rate=plan.rate, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, plan.pix_fmt
        stream.codec_context.time_base = plan.time_base
        stream.codec_context.gop_size = plan.gop
        stream.codec_context.thread_count = 1
        if plan.codec in ("mpeg4", "mpeg2", "mjpeg"):
            stream.codec_context.max_b_frames = plan.b_frames
            stream.codec_context.bit_rate = 2_000_000
        if plan.rotation is not None:
            stream.set_display_rotation(plan.rotation)
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if plan.pix_fmt != "rgb24":
                frame = frame.reformat(format=plan.pix_fmt)
            frame.time_base = plan.time_base
            frame.pts = plan.pts[i] if plan.pts is not None else plan.start_pts + i * plan.step
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def make_images(folder: str | Path, count: int = 8, suffix: str = "jpg", **size: int) -> Path:
    """Write pictures of `scene` as `frame0.jpg`, `frame1.jpg`, ... and return the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        bgr = cv2.cvtColor(scene(i, **size), cv2.COLOR_RGB2BGR)
        if not cv2.imwrite(str(folder / f"frame{i}.{suffix}"), bgr):
            raise OSError(f"could not write {folder / f'frame{i}.{suffix}'}")
    return folder


def truncate(source: str | Path, target: str | Path, keep: float) -> Path:
    """Copy the first share `keep` (0..1) of a file."""
    data = Path(source).read_bytes()
    Path(target).write_bytes(data[: int(len(data) * keep)])
    return Path(target)


def corrupt(
    source: str | Path,
    target: str | Path,
    *,
    count: int = 20,
    between: tuple[float, float] = (0.3, 0.9),
    seed: int = 0,
    run: int = 1,
) -> Path:
    """Copy a file with `count` runs of `run` bytes replaced at random, all within `between` of its length."""
    data = bytearray(Path(source).read_bytes())
    rng = np.random.default_rng(seed)
    low, high = int(len(data) * between[0]), int(len(data) * between[1]) - run
    for at in rng.integers(low, high, count):
        data[at : at + run] = rng.integers(0, 256, run, dtype=np.uint8).tobytes()
    Path(target).write_bytes(data)
    return Path(target)


def damage_packets(
    source: str | Path, target: str | Path, packets: Sequence[int], spared: float = 0.0
) -> Path:
    """Copy a file with the payload of the given video packets (in decode order) overwritten by noise.

    The first share `spared` (0..1) of each is kept: then the decoder outputs a concealed picture.
    """
    spans: list[tuple[int, int]] = []
    with av.open(str(source)) as container:
        for i, packet in enumerate(container.demux(video=0)):
            if i in packets and packet.pos is not None:
                spans.append((packet.pos, packet.size))
    data = bytearray(Path(source).read_bytes())
    rng = np.random.default_rng(3)
    for position, size in spans:
        first = max(4, round(size * spared))
        data[position + first : position + size] = rng.integers(
            0, 256, size - first, dtype=np.uint8
        ).tobytes()
    Path(target).write_bytes(data)
    return Path(target)


def copy(source: str | Path, target: str | Path) -> Path:
    return Path(shutil.copyfile(source, target))


def _encoder_options(plan: Recipe) -> dict[str, str]:
    if plan.codec in ("h264", "h264_rgb"):
        params = [
            f"keyint={plan.gop}",
            f"min-keyint={max(1, plan.gop // 2)}",
            f"bframes={plan.b_frames}",
            "b-adapt=0",
            "scenecut=0",
            f"open-gop={int(plan.open_gop)}",
            "threads=1",
        ]
        options = {"crf": str(plan.quality), "preset": "veryfast", "x264-params": ":".join(params)}
    elif plan.codec == "vp9":
        options = {"crf": "20", "b": "0", "cpu-used": "8", "deadline": "realtime", "g": str(plan.gop)}
    elif plan.codec == "vp8":
        options = {"crf": "20", "b": "1M", "cpu-used": "8", "g": str(plan.gop)}
    elif plan.codec == "hevc":
        params = [f"keyint={plan.gop}", f"bframes={plan.b_frames}", f"open-gop={int(plan.open_gop)}"]
        options = {"x265-params": ":".join(["log-level=none", *params])}
    else:
        options = {}
    return {**options, **plan.options}
