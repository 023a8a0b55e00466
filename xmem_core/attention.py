"""Anisotropic L2 similarity, top-k softmax and readout: pure functions (paper section 3.2, equations 2 to 4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def similarity(
    mem_key: Tensor, mem_shrinkage: Tensor | None, query_key: Tensor, query_selection: Tensor | None
) -> Tensor:
    """How well each memory element answers each query position, in fp32.

    Args:
        mem_key: (B, C_k, N)
        mem_shrinkage: (B, 1, N), or None for 1.
        query_key: (B, C_k, P)
        query_selection: (B, C_k, P) in 0..1, or None for the isotropic form. With None, |q|^2 is left out: it is
            the same for all elements of a query, and a softmax over them does not see it.

    Returns:
        (B, N, P): -s_i / sqrt(C_k) * sum_c e_cj (k_ci - q_cj)^2
    """
    scale = 1 / math.sqrt(mem_key.shape[1])
    k = mem_key.float().transpose(1, 2)  # B, N, C
    q = query_key.float()
    if query_selection is None:
        s = 2 * (k @ q) - (k * k).sum(2, keepdim=True)
    else:
        e = query_selection.float()
        # The square expanded, so that it is three small products instead of a B x C x N x P tensor.
        s = 2 * (k @ (q * e)) - (k * k) @ e - (e * q * q).sum(1, keepdim=True)
    if mem_shrinkage is not None:
        s = s * mem_shrinkage.float().transpose(1, 2)
    return s * scale


def softmax_weights(scores: Tensor, top_k: int | None) -> Tensor:
    """Softmax over memory elements, over the `top_k` best of each query alone.

    Args:
        scores: (B, N, P); -inf bars an element.
        top_k: all other weights are 0; None or at least N: plain softmax.

    Returns:
        (B, N, P), summing to 1 over N.
    """
    if top_k is None or top_k >= scores.shape[1]:
        return torch.softmax(scores, 1)
    best, index = torch.topk(scores, top_k, dim=1)
    return torch.zeros_like(scores).scatter_(1, index, torch.softmax(best, 1))


def readout(weights: Tensor, values: Tensor) -> Tensor:
    """Weighted sums of values: (B, N, P), (B, O, C_v, N) -> (B, O, C_v, P)."""
    b, o, c, n = values.shape
    out = values.reshape(b, o * c, n).to(weights.dtype) @ weights
    return out.view(b, o, c, -1)
