"""Outcomes by shapes are those of PyTorch's meta device, without its compiler."""

from __future__ import annotations

import collections
import subprocess
import sys
from typing import Any

import pytest
import torch
from support.small_net import SMALL_CUTIE

from pipeline.tracking import memory_plan, shapes
from xmem_core import ModelConfig
from xmem_core.config import AnyModelConfig

Facts = list[tuple[torch.Size, tuple[int, ...], torch.dtype, str]]
aten = torch.ops.aten


def facts(value: Any) -> Facts:
    tensors = [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]
    return [(t.shape, t.stride(), t.dtype, t.device.type) for t in tensors]


@pytest.mark.parametrize(
    "config", [ModelConfig.lite(), ModelConfig(), SMALL_CUTIE], ids=["lite", "published", "cutie"]
)
def test_a_network_built_and_run_has_the_outcomes_of_the_meta_device(
    config: AnyModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each operation of building, of folding and of a step; so the predicted bytes are the same."""
    found: collections.Counter[str] = collections.Counter()

    def compared(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (out := outcome(func, args, kwargs)) is not None:
            assert facts(out) == facts(func(*args, **kwargs)), (func, facts(args))
            found[func.overloadpacket.__name__] += 1
        return out

    outcome = shapes.outcome
    monkeypatch.setattr(shapes, "outcome", compared)
    peaks = memory_plan._network_peaks.__wrapped__(config, 64, 96, 3)
    assert {"add", "cat", "mean", "normal_", "upsample_bilinear2d"} <= found.keys()
    encoding = memory_plan._encoding_peaks.__wrapped__(config, 64, 96)
    monkeypatch.setattr(shapes, "outcome", lambda func, args, kwargs: None)
    assert memory_plan._network_peaks.__wrapped__(config, 64, 96, 3) == peaks
    assert memory_plan._encoding_peaks.__wrapped__(config, 64, 96) == encoding


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


_CONVOLVED = (meta(2, 9, 8, 3).permute(0, 3, 1, 2), meta(5, 3, 3, 3), meta(5))


@pytest.mark.parametrize(
    ("func", "args", "kwargs"),
    [
        (aten.add.Tensor, (meta(2, 3, 4), meta(3, 1)), {"alpha": 2}),
        (aten.mul.Tensor, (meta(2, 5, 4, 3).permute(0, 3, 1, 2), meta(3, 1, 1)), {}),
        (aten.mul.Tensor, (meta(3, 1, 1), meta(2, 5, 4, 3).permute(0, 3, 1, 2)), {}),
        (aten.mul.Tensor, (meta(4, 5), meta(3, 5, 4).permute(0, 2, 1)), {}),
        (aten.ge.Scalar, (meta(2, 3), 0.5), {}),
        (aten.zeros_like.default, (meta(2, 3),), {"pin_memory": False}),
        (aten.zeros_like.default, (meta(2, 4, 3).permute(0, 2, 1),), {"dtype": torch.int64}),
        (aten.ones_like.default, (meta(2, 1, 3),), {}),
        (aten.empty_like.default, (meta(2, 4, 3)[:, :2],), {}),
        (aten.empty_like.default, (meta(3, 1).expand(3, 2),), {}),
        (aten.empty_like.default, (meta(0, 2),), {}),
        (aten.bitwise_not.default, (meta(2, 3, dtype=torch.bool),), {}),
        (aten.cat.default, ([meta(2, 3), meta(2, 5)], -1), {}),
        (aten.cat.default, ([meta(2, 3), meta(1, 3)],), {}),
        (aten.stack.default, ([meta(2, 3), meta(2, 3)], -1), {}),
        (aten.stack.default, ([meta(2, 3), meta(2, 3)], 1), {}),
        (aten.mean.dim, (meta(2, 3, 4), [0, -1]), {}),
        (aten.mean.dim, (meta(2, 3, 4), [1], True), {}),
        (aten.all.dim, (meta(2, 3, dtype=torch.bool), -1), {}),
        (aten.any.dim, (meta(2, 3), 0, True), {}),
        (aten.any.default, (meta(2, 3),), {}),
        (aten.arange.default, (7,), {"device": "meta"}),
        (aten.arange.start_step, (1, 8, 2), {"dtype": torch.float32, "device": "meta"}),
        (aten.addmm.default, (meta(5), meta(2, 3), meta(3, 5)), {}),
        (aten.native_layer_norm.default, (meta(2, 3, 4), [3, 4], None, None, 1e-5), {}),
        (aten.upsample_bilinear2d.default, (meta(2, 3, 4, 5), [8, 9], False), {}),
        (aten.amax.default, (meta(2, 3, 4), [1], True), {}),
        (aten.sum.dim_IntList, (meta(2, 3, 4), [0, 2]), {}),
        (aten.sum.dim_IntList, (meta(2, 3, dtype=torch.bool), [0], True), {"dtype": torch.float32}),
        (aten.prod.dim_int, (meta(2, 3, 4), -1, True), {}),
        (aten._softmax.default, (meta(2, 3, 4), 1, False), {}),
        (aten.avg_pool2d.default, (meta(2, 3, 9, 8), [4, 4], [4, 4]), {}),
        (aten.avg_pool2d.default, (meta(2, 9, 8, 3).permute(0, 3, 1, 2), [2, 3]), {}),
        (aten.max_pool2d_with_indices.default, (meta(1, 3, 9, 8), [3, 3], [2, 2], [1, 1]), {}),
        (aten.convolution.default, (*_CONVOLVED, [2, 1], [1, 2], [1, 2], False, [0, 0], 1), {}),
        (
            aten.upsample_bilinear2d.default,
            (meta(2, 4, 5, 3).permute(0, 3, 1, 2), [8, 10], False, 2.0, 2.0),
            {},
        ),
    ],
    ids=str,
)
def test_an_operation_has_the_outcome_of_the_meta_device(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    assert facts(shapes.outcome(func, args, kwargs)) == facts(func(*args, **kwargs))


@pytest.mark.parametrize(
    ("func", "args", "kwargs"),
    [
        (aten.add.Tensor, (meta(2), meta(2, dtype=torch.float64)), {}),
        (aten.div.Tensor, (meta(2, dtype=torch.int64), meta(2, dtype=torch.int64)), {}),
        (aten.add.out, (meta(2), meta(2)), {"out": meta(2)}),
        (aten.cat.default, ([meta(2), meta(2, dtype=torch.int64)],), {}),
        (aten.arange.default, (2.5,), {"device": "meta"}),
        (aten.zeros_like.default, (meta(1, 3, 4, 4),), {"memory_format": torch.channels_last}),
        (aten.sum.dim_IntList, (meta(2, 3, dtype=torch.bool), [0]), {}),
        (aten._softmax.default, (meta(2, 4, 3).permute(0, 2, 1), 1, False), {}),
        (aten.avg_pool2d.default, (meta(2, 3, 9, 8), [4, 4], [2, 2]), {}),
        (aten.avg_pool2d.default, (meta(2, 3, 9, 8), [4, 4], [4, 4], [1, 1]), {}),
        (aten.convolution.default, (*_CONVOLVED, [1, 1], [1, 1], [1, 1], True, [0, 0], 1), {}),
        (aten.max_pool2d_with_indices.default, (meta(1, 3, 4, 4), [2, 2]), {}),
    ],
    ids=str,
)
def test_what_it_does_not_know_is_left_to_the_meta_device(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    assert shapes.outcome(func, args, kwargs) is None


def test_in_place_operations_return_their_first_argument() -> None:
    tensor = meta(2, 3)
    with shapes.Shapes():  # type: ignore[no-untyped-call]
        assert tensor.normal_(0, 1) is tensor
        assert tensor.add_(meta(3)) is tensor
        assert torch.relu_(tensor) is tensor


PROGRAM = """
import sys
from support.small_net import SMALL_CUTIE
from pipeline.tracking.memory_plan import predict_ahead_bytes, predict_workspace_bytes
from xmem_core import MemoryConfig, ModelConfig

def predict(config):
    assert predict_workspace_bytes(config, MemoryConfig(), 48, 64, 2) > 0
    assert predict_ahead_bytes(config, 48, 64) > 0

predict(ModelConfig.lite())
predict(ModelConfig())
print("sympy" in sys.modules)
predict(SMALL_CUTIE)
print("torch._dynamo" in sys.modules)
"""


def test_memory_is_predicted_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", ":".join(filter(None, sys.path)))
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout == "False\nFalse\n"
