"""What 1e-6 of relative noise on every weight does to the goldens: `test_golden.py` takes its bounds from it.

PYTHONPATH=.:tests:tests/xmem_core python tests/golden/noise.py [CASE ...]
"""

from __future__ import annotations

import sys

import xmem_core  # noqa: F401  before torch, as in every command: see xmem_core.openmp

# isort: split

import torch
from golden.weights import fill
from test_golden import distance, follow
from support.threads import torch_threads

from xmem_core import ModelConfig, VideoSegmenter, XMem

NOISE, SEEDS = 1e-6, range(4)


def noisy(seed: int) -> dict[int, VideoSegmenter]:
    """The published network with and without sensory memory, each weight times 1 + noise."""
    segmenters = {}
    for dim in (64, 0):
        model = XMem(ModelConfig(hidden_dim=dim)).eval()
        generator = torch.Generator().manual_seed(seed)
        weights = {
            name: t * (1 + NOISE * torch.randn(t.shape, generator=generator)) if t.is_floating_point() else t
            for name, t in fill(model.state_dict()).items()
        }
        model.load_state_dict(weights)
        segmenters[dim] = VideoSegmenter(model, keep_model=False)
    return segmenters


def main() -> None:
    """Print a line for each case and seed."""
    with torch_threads(2):
        for case in sys.argv[1:] or ["defaults"]:
            for seed in SEEDS:
                sys.stdout.write(f"{case}, seed {seed}: {distance(follow(case, noisy(seed)))}\n")


if __name__ == "__main__":
    main()
