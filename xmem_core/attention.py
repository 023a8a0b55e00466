"""Anisotropic L2 similarity, top-k softmax and readout: pure functions.

Source: paper section 3.2, equations 2 to 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Queries searched at a time on a CPU: their scores for all elements then stay in its cache.
_CPU_BLOCK = 64


def _prepare(mem_key: Tensor, mem_shrinkage: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the memory's side contributes, computed once for all queries."""
    k = mem_key.float()
    return 2 * k, k * k, mem_shrinkage.float() / math.sqrt(mem_key.shape[1])


def _scores(memory: tuple[Tensor, Tensor, Tensor], query_key: Tensor, query_selection: Tensor) -> Tensor:
    """Similarity, (B, P, N): each query's row lies in one piece, which makes its top k cheap to find.

    The square in e (k - q)^2 is expanded, so that two matrix products replace a B x C x N x P tensor. Not
    by one product, nor in another order: so rounding errors are the published model's own, which brings its
    golden outputs four times closer.
    """
    twice, squared, scale = memory
    q, e = query_key.float(), query_selection.float()
    scores = (q * e).mT @ twice
    scores -= e.mT @ squared
    scores -= (e * (q * q)).sum(1).unsqueeze(2)
    scores *= scale
    return scores


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
    return _scores(_prepare(mem_key, mem_shrinkage), query_key, query_selection).mT


def search(
    mem_key: Tensor,
    mem_shrinkage: Tensor,
    query_key: Tensor,
    query_selection: Tensor,
    top_k: int,
    barred: Sequence[Tensor | None],
) -> list[tuple[Tensor, Tensor]]:
    """The elements that each query reads and their weights, for several readers with one look at the scores.

    Args:
        mem_key: (C_k, N)
        mem_shrinkage: (N,)
        query_key, query_selection: (C_k, P)
        top_k: elements that a query reads at most.
        barred: a reader's forbidden elements, (N,) bool, or None; one entry per reader.

    Returns:
        per reader weights (P, k) and indices (P, k), as `top_k_weights` gives them.
    """
    memory = _prepare(mem_key.unsqueeze(0), mem_shrinkage.view(1, 1, -1))
    positions = query_key.shape[1]
    block = _CPU_BLOCK if query_key.device.type == "cpu" else positions
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in barred]
    for start in range(0, positions, block):
        part = (t[:, start : start + block].unsqueeze(0) for t in (query_key, query_selection))
        scores = _scores(memory, *part)[0]
        for reader, bar in zip(found, barred, strict=True):
            seen = scores if bar is None else scores.masked_fill(bar, float("-inf"))
            reader.append(top_k_weights(seen, top_k))
    return [(torch.cat([w for w, _ in parts]), torch.cat([i for _, i in parts])) for parts in found]


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
