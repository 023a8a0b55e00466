"""Writes what lies beside it: output folders and snapshots as they were before the modules moved into rooms.

    PYTHONPATH=.:tests python tests/golden/before_rooms/make.py

It was run at commit 7fa8037 and is kept to show how the files came about; running it again would replace them by
those of a later version, which is what `tests/test_compatibility.py` must not compare with.
"""

from __future__ import annotations

import os
import shutil
import time
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from pipeline.tracking.settings import TrackSettings
from xmem_core import MemoryConfig, XMem
from xmem_core.weights import save_weights

FOLDER = Path(__file__).parent
VIDEO = FOLDER / "walk.mp4"
FRAMES = 40
CUT_AT = 36  # frames 0 to 31 have rows then, and the snapshot is of frame 24

MEMORY: dict[str, int] = {
    "mem_every": 2,
    "top_k": 8,
    "min_mid_term_frames": 2,
    "max_mid_term_frames": 4,
    "num_prototypes": 6,
    "max_long_term_elements": 20,
    "max_permanent_frames": 2,
}
# Later versions have another rule for which prompted frames stay where there are more of them than this.
FILE_MEMORY = {**MEMORY, "max_permanent_frames": 6}
PROMPTS: dict[str, Any] = {
    "version": 1,
    "objects": [
        {"frame": 21, "id": 1, "category": "corner", "polygons": [[44, 2, 60, 2, 60, 12, 44, 12]]},
        {"frame": 34, "id": 9, "polygons": [[2, 34, 18, 34, 18, 44, 2, 44]]},
    ],
    "remove": [{"frame": 37, "id": 1}],
}


def picture(index: int) -> np.ndarray:
    """Picture `index`, 48 x 64 x 3 uint8 RGB: a dark thing walks through a still scene, and later another one."""
    rng = np.random.default_rng(3)
    coarse = rng.integers(90, 170, (6, 8, 3), dtype=np.uint8)
    image = np.asarray(cv2.resize(coarse, (64, 48), interpolation=cv2.INTER_CUBIC)).copy()
    for begin, top, colour in ((11, 8, (20, 20, 30)), (23, 28, (30, 20, 120))):
        left = 3 * (index - begin)
        if left > 0:
            image[top : top + 16, max(0, left - 9) : min(64, left)] = colour
    return image


def model() -> XMem:
    """A small network whose weights are the same to the bit on every machine: whole numbers, scaled."""
    from support.tiny import TINY

    network = XMem(TINY)
    network.load_state_dict({name: _tensor(name, t) for name, t in network.state_dict().items()})
    return network.eval()


def _tensor(name: str, like: torch.Tensor) -> torch.Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.zeros_like(like)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    drawn = (rng.integers(-64, 65, tuple(like.shape)) / 64).astype(np.float32)
    if like.ndim == 1:
        scale = like.numel() > 0 and name.endswith(("weight", "running_var"))
        return torch.from_numpy(1 + drawn / 8 if scale else drawn / 16)
    # A power of two near 2.5 / sqrt(fan in): the product is exact.
    fan_in = int(np.prod(like.shape[1:]))
    return torch.from_numpy(drawn * np.float32(2.0 ** round(np.log2(2.5 / fan_in**0.5))))


def arguments(weights: Path) -> dict[str, Any]:
    """Of `track`, without video, output and prompts."""
    return {
        "stream_id": "walk",
        "model": str(weights),
        "threads": 1,
        "dtype": "float32",
        "chunk_frames": 8,
        "snapshot_chunks": 3,
        "detector": "motion",
        "detect_every": 2,
        "out_of_sight_frames": 6,
    }


def walk_feed(spec: Any, ledger: Any) -> Any:
    """For `LiveHub(open_feed=...)`: shows `picture` again and again."""
    from support.live_fake import FakeFeed

    feed = FakeFeed(spec, ledger)
    feed.scene = [picture(i) for i in range(FRAMES)]
    feed.height, feed.width = feed.scene[0].shape[:2]
    return feed


def _make_file_streams(weights: Path) -> None:
    from support.interrupted import InterruptedRunError, stop_at

    from pipeline.tracking.track import track
    from pipeline.prompts.resolving import PromptSet

    for name, stop in (("whole", None), ("cut", stop_at(CUT_AT))):
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        os.chdir(FOLDER)  # a relative source, so that the record names no folder of this machine
        try:
            track(
                "walk.mp4",
                FOLDER / name,
                PromptSet.from_record(PROMPTS),
                memory=MemoryConfig(**FILE_MEMORY),
                on_frame=stop,
                **arguments(weights),
            )
        except InterruptedRunError:
            pass
    shutil.rmtree(FOLDER / "whole" / "state")
    for out in ("cut",):
        for old in sorted((FOLDER / out / "state").rglob("*.safetensors"))[:-1]:
            old.unlink()


def _make_live_stream() -> None:
    """A camera's stream in a process that ends without closing anything, after a request it acknowledged."""
    out = FOLDER / "live"
    shutil.rmtree(out, ignore_errors=True)
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    from pipeline.live.hub.hub import HubSettings, LiveHub
    from pipeline.live.spec import LiveSettings, LiveSpec
    from xmem_core import VideoSegmenter

    torch.set_num_threads(1)
    memory = MemoryConfig(**MEMORY)
    hub = LiveHub(
        HubSettings(str(out), tracking=TrackSettings(memory=memory), calibrate=False),
        segmenter=VideoSegmenter(model(), memory, size=48),
        open_feed=walk_feed,
    )
    chosen = LiveSettings.from_dict({"rotate_seconds": 3.0, "snapshot_seconds": 60.0, "detect_every": 2})
    hub.add(LiveSpec("cam", "fake://cam?fps=10", None, "motion", chosen))
    state = out / "state" / "cam"
    while not hub.status("cam")["objects"] or not list(state.glob("*.safetensors")):
        time.sleep(0.05)
    corner = {"category": "corner", "polygons": [[44, 2, 60, 2, 60, 12, 44, 12]]}
    hub.request("cam", {"prompts": {"objects": [corner]}})
    os._exit(0)


def main() -> None:
    from support.threads import torch_threads
    from support.videos import make_video

    pictures = [picture(i) for i in range(FRAMES)]
    make_video(VIDEO, pictures, rate=10, time_base=Fraction(1, 10), quality=30, b_frames=2, gop=8)
    weights = Path(os.environ.get("TMPDIR", "/tmp")) / "before_rooms.safetensors"
    save_weights(model(), weights)
    with torch_threads(1):
        _make_file_streams(weights)
    _make_live_stream()


if __name__ == "__main__":
    main()
