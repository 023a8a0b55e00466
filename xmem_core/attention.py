"""Anisotropic L2 similarity, top-k softmax and readout: pure functions.

Source: paper section 3.2, equations 2 to 4.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _factors(
    mem_key: Tensor, mem_shrinkage: Tensor, query_key: Tensor, query_selection: Tensor
) -> tuple[Tensor, Tensor]:
    """(B, N, 2C+1) and (B, 2C+1, P), whose product is the similarity.

    The square in e (k - q)^2 is expanded, so that one matrix product replaces a B x C x N x P tensor.
    """
    k = mem_key.float().mT  # B, N, C
    q, e = query_key.float(), query_selection.float()
    s = mem_shrinkage.float().mT / math.sqrt(mem_key.shape[1])  # B, N, 1
    left = torch.cat([2 * s * k, -s * k * k, -s], 2)
    right = torch.cat([q * e, e, (e * q * q).sum(1, keepdim=True)], 1)
    return left, right


def similarity(mem_key: Tensor, mem_shrinkage: Tensor, query_key: Tensor, query_selection: Tensor) -> Tensor:
    """How well each memory element answers each query position, in fp32 (equation 2).

    Args:
        mem_key: (B, C_k, N)
        mem_shrinkage: (B, 1, N)
        query_key: (B, C_k, P)
        query_selection: (B, C_k, P) in 0..1; all ones make it isotropic.

    Returns:
        (B, N, P): -s_i / sqrt(C_k) * sum_c e_cj (k_ci - q_cj)^2
    """
    left, right = _factors(mem_key, mem_shrinkage, query_key, query_selection)
    return left @ right


def similarity_by_query(
    mem_key: Tensor, mem_shrinkage: Tensor, query_key: Tensor, query_selection: Tensor
) -> Tensor:
    """`similarity` as (B, P, N): each query's row lies in one piece, which makes its top k cheap to find."""
    left, right = _factors(mem_key, mem_shrinkage, query_key, query_selection)
    return right.mT @ left.mT


def readout(weights: Tensor, values: Tensor) -> Tensor:
    """Weighted sums of values: (B, N, P), (B, O, C_v, N) -> (B, O, C_v, P)."""
    b, o, c, n = values.shape
    out = values.reshape(b, o * c, n).to(weights.dtype) @ weights
    return out.view(b, o, c, -1)


def top_k_weights(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Softmax over each query's `top_k` best elements alone (equation 3); all others weigh nothing.

    Args:
        scores: (P, N); -inf bars an element.
        top_k: fewer elements than this: all of them.

    Returns:
        weights (P, k), summing to 1 (or all 0 where every element is barred), and indices (P, k).
    """
    best, index = torch.topk(scores, min(top_k, scores.shape[1]), dim=1)
    weights = torch.softmax(best, 1)
    return torch.nan_to_num_(weights, nan=0.0), index


def sparse_readout(weights: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Weighted sums of the rows that each query chose.

    Args:
        weights: (P, k)
        index: (P, k) rows of `values`
        values: (N, C_v)

    Returns:
        (P, C_v). It touches P * k rows, where the dense product would touch all N for every query.
    """
    return F.embedding_bag(index, values, mode="sum", per_sample_weights=weights.to(values.dtype))
