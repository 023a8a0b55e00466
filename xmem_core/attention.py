"""Anisotropic L2 similarity, top-k softmax and readout: pure functions.

Source: paper section 3.2, equations 2 to 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xmem_core.aside import each, helper

# Queries per block on a CPU, so that the scores of a block stay in the cache.
_CPU_BLOCK = 128
# Elements from which on a CPU computes scores in pieces of so many elements, which stay in the second-level
# cache: of 17,500 elements in 5.3 ms instead of 6.4 for 128 queries.
_IN_PIECES_FROM, _PIECE = 8192, 2048
# Scores of a block on a GPU, 256 MB, and its least number of queries.
_GPU_SCORES, _LEAST_BLOCK = 1 << 26, 128
# Group size of the staged top-k: scores per candidate of the next stage.
_GROUP = 4
_COARSE_GROUP = 8
# Elements that bfloat16 takes for the best, as a multiple of top_k, among which float32 chooses. What is read
# then differs from a search in float32 alone by a millionth of the weights on average, 4 millionths at most
# (xmem-lite, 9,000 elements); with 1.3 by 5 % at single queries.
_CANDIDATES = 1.6
# A reader's own elements are searched apart from the others if they are at most this share of all, and lie in
# at most so many spans.
_APART, _MOST_SPANS = 0.75, 16


class Searchable(NamedTuple):
    """The memory-side factors of the similarity, computed once for all queries.

    Attributes:
        twice, squared: 2 k and k^2, (B, C_k, N) or (C_k, N)
        scale: s / sqrt(C_k), (B, 1, N) or (1, N)
    """

    twice: Tensor
    squared: Tensor
    scale: Tensor


class CoarselySearchable(NamedTuple):
    """Memory-side factors of a two-stage search: candidates in bfloat16, the top k in float32.

    Attributes:
        key: (N, C_k)
        scale: s / sqrt(C_k), (N,)
        product: scale * (2 k, -k^2, -1), (2 C_k + 1, N) bfloat16: a matrix product with it gives the scores.
    """

    key: Tensor
    scale: Tensor
    product: Tensor


def searchable(mem_key: Tensor, mem_shrinkage: Tensor) -> Searchable:
    """Prepare elements for `search`: keys (C_k, N) or (B, C_k, N), shrinkage (1, N) or (B, 1, N)."""
    k = mem_key.float()
    return Searchable(2 * k, k * k, mem_shrinkage.float() / math.sqrt(mem_key.shape[-2]))


def coarsely_searchable(mem_key: Tensor, mem_shrinkage: Tensor) -> CoarselySearchable:
    """Prepare elements for a coarse `search`: keys (N, C_k), shrinkage (N,)."""
    count, dim = mem_key.shape
    key, scale = mem_key.float(), mem_shrinkage.float() / math.sqrt(dim)
    product = torch.empty(2 * dim + 1, count, dtype=torch.bfloat16, device=key.device)
    part = key.T * (2 * scale)
    product[:dim] = part
    product[dim:-1] = part.mul_(key.T).mul_(-0.5)
    product[-1] = -scale
    return CoarselySearchable(key, scale, product)


def _scores(memory: Searchable, query_key: Tensor, query_selection: Tensor) -> Tensor:
    """Similarity, (..., P, N): each query's row lies in one piece, which makes its top k cheap to find.

    The square in e (k - q)^2 is expanded, so that two matrix products replace a B x C x N x P tensor. Not
    by one product, nor in another order: so rounding errors are the published model's own, which brings its
    golden outputs four times closer.
    """
    q, e = query_key.float(), query_selection.float()
    count = memory.scale.shape[-1]
    if q.ndim == 2 and count > _IN_PIECES_FROM and q.device.type == "cpu":
        return _scores_in_pieces(memory, q, e)
    scores = (q * e).mT @ memory.twice
    # In place: the score matrix is large, and a pass over it costs as much as a matrix product.
    accumulate = scores.addmm_ if scores.ndim == 2 else scores.baddbmm_
    accumulate(e.mT, memory.squared, alpha=-1)
    scores -= (e * (q * q)).sum(-2).unsqueeze(-1)
    scores *= memory.scale
    return scores


def _scores_in_pieces(memory: Searchable, q: Tensor, e: Tensor) -> Tensor:
    """`_scores`, to the bit, of so many elements that each pass over all scores would leave the cache."""
    count = memory.scale.shape[-1]
    query, weight = (q * e).mT.contiguous(), e.mT.contiguous()
    offset = (e * (q * q)).sum(-2).unsqueeze(-1)
    scores = q.new_empty(q.shape[1], count)
    for start in range(0, count, _PIECE):
        part = slice(start, start + _PIECE)
        own = scores[:, part]
        torch.mm(query, memory.twice[:, part], out=own)
        own.addmm_(weight, memory.squared[:, part], alpha=-1)
        own -= offset
        own *= memory.scale[:, part]
    return scores


def similarity(mem_key: Tensor, mem_shrinkage: Tensor, query_key: Tensor, query_selection: Tensor) -> Tensor:
    """Similarity of each memory element to each query position, in fp32 (equation 2).

    Args:
        mem_key: (B, C_k, N)
        mem_shrinkage: (B, 1, N)
        query_key: (B, C_k, P)
        query_selection: (B, C_k, P) in 0..1; all ones make it isotropic.

    Returns:
        (B, N, P): -s_i / sqrt(C_k) * sum_c e_cj (k_ci - q_cj)^2
    """
    return _scores(searchable(mem_key, mem_shrinkage), query_key, query_selection).mT


def search(
    memory: Searchable | CoarselySearchable,
    query_key: Tensor,
    query_selection: Tensor,
    top_k: int,
    barred: Sequence[Tensor | None],
    *,
    wanted: Sequence[Tensor | None] | None = None,
    enough: Sequence[int | None] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Find the elements that each query reads and their weights, computing scores once for all readers.

    On a CPU blocks of queries are shared with another thread, see `xmem_core.aside`.

    Args:
        memory: N elements without a batch dimension. Coarsely searchable ones are faster where a CPU
            multiplies bfloat16 itself and there are many of them, see `ModelSteps.searches_coarsely`.
        query_key, query_selection: (C_k, P)
        top_k: maximum number of elements that a query reads.
        barred: a reader's forbidden elements, (N,) bool, or None; one entry per reader.
        wanted: queries whose result is used, (P,) bool, or None for all; one entry per reader. At the others
            a reader with forbidden elements gets none: weights 0.
        enough: with how many elements a reader with forbidden ones is content at a query, if these are among
            the best of all elements; with fewer, its own are searched, which takes about as long as the first
            search. None: it gets exactly its best `top_k`. One entry per reader.

    Returns:
        per reader weights (P, k) and indices (P, k), as `top_k_weights` gives them.
    """
    if query_key.device.type != "cpu":
        assert isinstance(memory, Searchable)
        return _search_all(memory, query_key.float(), query_selection.float(), top_k, barred, wanted)
    open_to = [None if bar is None else _Open.of(bar) for bar in barred]

    def of_block(start: int) -> list[tuple[Tensor, Tensor]]:
        part = slice(start, start + _CPU_BLOCK)
        key, selection = query_key[:, part].float(), query_selection[:, part].float()
        if isinstance(memory, CoarselySearchable):
            scores = _coarse_scores(memory, key, selection)
        else:
            scores = _scores(memory, key, selection)
        own = [None if rows is None else rows[part] for rows in wanted or (None,) * len(barred)]
        queries = _Queries(memory, scores, key, selection)
        return _read_by_each(queries, top_k, open_to, own, enough or (None,) * len(barred))

    starts = range(0, query_key.shape[1], _CPU_BLOCK)
    found = each([partial(of_block, start) for start in starts], helper())
    return [
        (torch.cat([w for w, _ in parts]), torch.cat([i for _, i in parts]))
        for parts in zip(*found, strict=True)
    ]


def _search_all(
    memory: Searchable,
    query_key: Tensor,
    query_selection: Tensor,
    top_k: int,
    barred: Sequence[Tensor | None],
    wanted: Sequence[Tensor | None] | None,
) -> list[tuple[Tensor, Tensor]]:
    """`search` on a GPU: every reader gets exactly its best elements, and nothing waits for the device.

    Queries are taken in blocks, so that the scores take bounded memory.
    """
    positions, elements = query_key.shape[1], memory.scale.shape[-1]
    block = max(_LEAST_BLOCK, _GPU_SCORES // elements)
    found: list[list[tuple[Tensor, Tensor]]] = []
    for start in range(0, positions, block):
        part = slice(start, start + block)
        scores = _scores(memory, query_key[:, part], query_selection[:, part])
        own = []
        for bar, used in zip(barred, wanted or (None,) * len(barred), strict=True):
            open_to = scores if bar is None else scores.masked_fill(bar, float("-inf"))
            weights, index = top_k_weights(open_to, top_k)
            if bar is not None and used is not None:
                weights = weights * used[part].unsqueeze(1)
            own.append((weights, index))
        found.append(own)
    return [
        (torch.cat([w for w, _ in parts]), torch.cat([i for _, i in parts]))
        for parts in zip(*found, strict=True)
    ]


class _Open(NamedTuple):
    """The elements that a reader with forbidden ones may read.

    Attributes:
        barred: the others, (N,) bool.
        elements: indices of the readable ones, ascending.
        spans: the same as (start, end) of runs of successive indices.
    """

    barred: Tensor
    elements: Tensor
    spans: list[tuple[int, int]]

    @classmethod
    def of(cls, barred: Tensor) -> _Open:
        index = (~barred).nonzero().flatten()
        last = (index.diff() > 1).nonzero().flatten()  # of a run
        starts, ends = index[torch.cat([last.new_zeros(1), last + 1])[: len(index)]], index[last] + 1
        spans = list(zip(starts.tolist(), [*ends.tolist(), *(index[-1:] + 1).tolist()], strict=True))
        return cls(barred, index, spans)


class _Queries(NamedTuple):
    """Some queries and their scores.

    Attributes:
        memory: the N elements.
        scores: (P, N), exact or, of coarsely searchable elements, in bfloat16.
        key, selection: (C_k, P)
    """

    memory: Searchable | CoarselySearchable
    scores: Tensor
    key: Tensor
    selection: Tensor

    def candidates(self, top_k: int, elements: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Exact scores and indices, (P, n) each, of the elements among which the best `top_k` are.

        Args:
            elements: indices of the elements of which the scores are; None: all.
        """
        count = min(self.wanted(top_k), self.scores.shape[1])
        coarse = isinstance(self.memory, CoarselySearchable)
        best, index = _best(self.scores, count, _COARSE_GROUP if coarse else _GROUP)
        if elements is not None:
            index = elements[index]
        if isinstance(self.memory, CoarselySearchable):
            distance = F.embedding(index, self.memory.key) - self.key.T.unsqueeze(1)  # P, n, C_k
            best = distance.square_().mul_(self.selection.T.unsqueeze(1)).sum(2).neg_()
            best *= self.memory.scale[index]
        return best, index

    def wanted(self, top_k: int) -> int:
        """Number of candidates."""
        return math.ceil(_CANDIDATES * top_k) if isinstance(self.memory, CoarselySearchable) else top_k

    def candidates_of(self, rows: Tensor, reader: _Open, top_k: int) -> tuple[Tensor, Tensor]:
        """`candidates` of the queries of these rows among the elements that a reader may read."""
        key, selection = self.key[:, rows], self.selection[:, rows]
        total = self.scores.shape[1]
        if self.wanted(top_k) <= len(reader.elements) <= _APART * total and len(reader.spans) <= _MOST_SPANS:
            parts = [self.scores[:, start:end].index_select(0, rows) for start, end in reader.spans]
            own = _Queries(self.memory, torch.cat(parts, 1), key, selection)
            return own.candidates(top_k, reader.elements)
        scores = self.scores[rows].masked_fill_(reader.barred, float("-inf"))
        best, index = _Queries(self.memory, scores, key, selection).candidates(top_k)
        return best.masked_fill_(reader.barred[index], float("-inf")), index


def _read_by_each(
    queries: _Queries,
    top_k: int,
    open_to: Sequence[_Open | None],
    wanted: Sequence[Tensor | None],
    enough: Sequence[int | None],
) -> list[tuple[Tensor, Tensor]]:
    """`search` for one block of queries.

    Readers with forbidden elements choose among the candidates of all elements. Only where too few of these
    are left for a reader, it searches its own elements.
    """
    scores, index = queries.candidates(top_k)
    found = []
    for reader, used, least in zip(open_to, wanted, enough, strict=True):
        if reader is None:
            weights, place = top_k_weights(scores, top_k)
            found.append((weights, index.gather(1, place)))
            continue
        rows = None if used is None else used.nonzero().flatten()
        own_scores, own_index = (scores, index) if rows is None else (scores[rows], index[rows])
        out = reader.barred[own_index]
        weights, place = top_k_weights(own_scores.masked_fill(out, float("-inf")), top_k)
        chosen = own_index.gather(1, place)
        least = index.shape[1] if least is None else least
        again = ((~out).sum(1) < min(least, len(reader.elements))).nonzero().flatten()
        if len(again):
            own_scores, own_index = queries.candidates_of(
                again if rows is None else rows[again], reader, top_k
            )
            weights[again], place = top_k_weights(own_scores, top_k)
            chosen[again] = own_index.gather(1, place)
        if rows is not None:
            weights = weights.new_zeros((len(scores), weights.shape[1])).index_copy_(0, rows, weights)
            chosen = chosen.new_zeros((len(scores), chosen.shape[1])).index_copy_(0, rows, chosen)
        found.append((weights, chosen))
    return found


def _coarse_scores(memory: CoarselySearchable, query_key: Tensor, query_selection: Tensor) -> Tensor:
    """Similarity, (P, N), in bfloat16: wrong by about a tenth, too inaccurate for weights."""
    q, e = query_key, query_selection
    query = torch.cat([q * e, e, (e * (q * q)).sum(0, keepdim=True)])
    return query.T.to(torch.bfloat16) @ memory.product


def readout(weights: Tensor, values: Tensor) -> Tensor:
    """Weighted sums of values: (B, N, P), (B, O, C_v, N) -> (B, O, C_v, P)."""
    b, o, c, n = values.shape
    out = values.reshape(b, o * c, n).to(weights.dtype) @ weights
    return out.view(b, o, c, -1)


def top_k_weights(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Softmax over each query's `top_k` best elements (equation 3); all others get weight 0.

    Args:
        scores: (P, N); -inf bars an element.
        top_k: fewer elements than this: all of them.

    Returns:
        weights (P, k), summing to 1 (or all 0 where every element is barred), and indices (P, k).
    """
    best, index = _best(scores, min(top_k, scores.shape[1]))
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


def _best(scores: Tensor, k: int, group: int = _GROUP) -> tuple[Tensor, Tensor]:
    """`torch.topk` of each row of (P, N), descending; on a CPU in stages, in half its time.

    An element among a row's best k lies in one of the k groups with the greatest maxima: every other group
    has k elements before it. So groups of groups are narrowed down to k, then the groups in those, then the
    elements. Ties are broken deterministically.
    """
    stages = [scores]
    while scores.device.type == "cpu" and stages[-1].shape[1] // group >= 3 * k:
        last = stages[-1]
        width = last.shape[1] // group
        # Group i: elements i, i + width, ... So the maxima are taken over whole vectors.
        stages.append(last[:, : width * group].view(len(last), group, width).amax(1))
    best, index = torch.topk(stages.pop(), k, dim=1, sorted=not stages)
    while stages:
        stage = stages.pop()
        width = stage.shape[1] // group
        members = index.unsqueeze(2) + torch.arange(0, width * group, width, device=scores.device)
        ungrouped = torch.arange(width * group, stage.shape[1], device=scores.device)
        candidates = torch.cat([members.flatten(1), ungrouped.expand(len(stage), -1)], 1)
        best, place = torch.topk(stage.gather(1, candidates), k, dim=1, sorted=not stages)
        index = candidates.gather(1, place)
    return best, index
