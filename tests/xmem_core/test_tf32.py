"""float32 on a GPU is float32, not TF32, unless it is asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.small_net import small_model

from xmem_core import VideoSegmenter, segmenter
from xmem_core.tf32 import set_tf32


def flags() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture(autouse=True)
def same_flags_afterwards() -> Iterator[None]:
    before = flags()
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("allowed", [False, True])
def test_both_flags_are_set_for_a_gpu(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not allowed
    set_tf32(torch.device("cuda"), allowed)
    assert flags() == (allowed, allowed)


def test_a_cpu_leaves_them_to_the_program() -> None:
    before = flags()
    set_tf32(torch.device("cpu"), not before[1])
    assert flags() == before


@pytest.mark.parametrize("asked", [None, False, True])
def test_a_segmenter_forbids_it_unless_asked(asked: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[torch.device, bool]] = []
    monkeypatch.setattr(segmenter, "set_tf32", lambda *call: calls.append(call))
    if asked is None:
        VideoSegmenter(small_model())
    else:
        VideoSegmenter(small_model(), allow_tf32=asked)
    assert calls == [(torch.device("cpu"), bool(asked))]
