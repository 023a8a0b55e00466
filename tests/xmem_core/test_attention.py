from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xmem_core import attention
from xmem_core.attention import (
    coarsely_searchable,
    readout,
    search,
    searchable,
    similarity,
    sparse_readout,
    top_k_weights,
)


def random_inputs(seed: int, elements: int, queries: int, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    key = torch.randn(2, dim, elements, generator=g)
    shrinkage = 1 + torch.randn(2, 1, elements, generator=g) ** 2
    query = torch.randn(2, dim, queries, generator=g)
    return key, shrinkage, query, torch.rand(2, dim, queries, generator=g)


def by_definition(key: Tensor, shrinkage: Tensor, query: Tensor, selection: Tensor) -> Tensor:
    """-s_i / sqrt(C_k) * sum_c e_cj (k_ci - q_cj)^2, term by term in float64."""
    k, s, q, e = (t.double() for t in (key, shrinkage, query, selection))
    out = torch.zeros(k.shape[0], k.shape[2], q.shape[2], dtype=torch.float64)
    for b in range(k.shape[0]):
        for i in range(k.shape[2]):
            for j in range(q.shape[2]):
                distance = (e[b, :, j] * (k[b, :, i] - q[b, :, j]) ** 2).sum()
                out[b, i, j] = -s[b, 0, i] / math.sqrt(k.shape[1]) * distance
    return out


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 5), st.integers(1, 9))
def test_similarity_is_its_definition(seed: int, elements: int, queries: int, dim: int) -> None:
    inputs = random_inputs(seed, elements, queries, dim)
    expected = by_definition(*inputs)
    torch.testing.assert_close(similarity(*inputs).double(), expected, rtol=1e-5, atol=1e-5)


def test_similarity_is_in_fp32_whatever_comes_in() -> None:
    inputs = tuple(t.bfloat16() for t in random_inputs(0, 5, 4, 8))
    got = similarity(*inputs)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), by_definition(*inputs), rtol=1e-5, atol=1e-5)


def test_without_selection_it_ranks_as_the_isotropic_formula() -> None:
    key, shrinkage, query, _ = random_inputs(3, 20, 4, 8)
    got = similarity(key, torch.ones_like(shrinkage), query, torch.ones_like(query))
    # |q|^2 is the same for every element, so the softmax over elements does not see it.
    isotropic = (-(key**2).sum(1).unsqueeze(2) + 2 * key.mT @ query) / math.sqrt(8)
    torch.testing.assert_close(torch.softmax(got, 1), torch.softmax(isotropic, 1), rtol=1e-4, atol=1e-6)


def test_top_k_weights_are_a_softmax_over_the_best_alone() -> None:
    scores = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    weights, index = top_k_weights(scores, 2)
    assert index.tolist() == [[1, 3]]
    e = math.e
    torch.testing.assert_close(weights, torch.tensor([[e / (e + 1), 1 / (e + 1)]]))


def test_fewer_elements_than_top_k_are_all_read() -> None:
    scores = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    weights, index = top_k_weights(scores, 30)
    assert weights.shape == (5, 3)
    dense = torch.zeros(5, 3).scatter_(1, index, weights)
    torch.testing.assert_close(dense, torch.softmax(scores, 1))


def test_barred_elements_weigh_nothing_even_where_all_are() -> None:
    inf = float("inf")
    weights, index = top_k_weights(torch.tensor([[-inf, 1.0, -inf], [-inf, -inf, -inf]]), 2)
    assert weights[0].tolist() == [1.0, 0.0]
    assert index[0, 0] == 1
    assert weights[1].tolist() == [0.0, 0.0]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.integers(1, 700), st.integers(1, 9), st.booleans())
def test_the_best_are_found_in_stages(seed: int, elements: int, top_k: int, barred: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    scores = torch.rand(3, elements, generator=g).argsort(1).float()  # no two alike
    if barred:
        scores[torch.rand(3, elements, generator=g) < 0.97] = -math.inf
    weights, index = top_k_weights(scores, top_k)
    best = torch.topk(scores, min(top_k, elements), 1).values
    assert torch.equal(scores.gather(1, index), best)
    assert all(len(set(row)) == len(row) for row in index.tolist())
    expected = torch.nan_to_num(torch.softmax(best, 1), nan=0.0)
    assert torch.equal(weights, expected)


def test_of_equal_scores_the_same_ones_are_found_again() -> None:
    scores = torch.zeros(2, 1000)
    assert torch.equal(top_k_weights(scores, 30)[1], top_k_weights(scores.clone(), 30)[1])


@pytest.mark.parametrize("top_k", [1, 4, 50])
def test_sparse_readout_equals_the_dense_product(top_k: int) -> None:
    g = torch.Generator().manual_seed(1)
    scores, values = torch.randn(6, 40, generator=g), torch.randn(40, 7, generator=g)
    weights, index = top_k_weights(scores, top_k)
    dense = torch.zeros(6, 40).scatter_(1, index, weights)
    expected = readout(dense.T.unsqueeze(0), values.T.view(1, 1, 7, 40))[0, 0]
    torch.testing.assert_close(sparse_readout(weights, index, values).T, expected)


@pytest.mark.parametrize("queries", [1, 64, 150])  # one block, exactly one, several
def test_search_finds_for_every_reader_what_the_whole_matrix_shows(queries: int) -> None:
    key, shrinkage, query, selection = (t[0] for t in random_inputs(7, 40, queries, 8))
    bar = torch.arange(40) < 25
    found = search(searchable(key, shrinkage), query, selection, 6, [None, bar])
    scores = similarity(*(t.unsqueeze(0) for t in (key, shrinkage, query, selection)))[0].T
    for (weights, index), seen in zip(found, (scores, scores.masked_fill(bar, -math.inf)), strict=True):
        expected_weights, expected_index = top_k_weights(seen, 6)
        assert torch.equal(index, expected_index)
        torch.testing.assert_close(weights, expected_weights)
    assert found[1][1].min() >= 25


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.99, 1.0])
def test_readers_that_share_candidates_find_what_each_would_find_alone(share: float, coarse: bool) -> None:
    key, shrinkage, query, selection = (t[0] for t in random_inputs(3, 600, 200, 16))
    g = torch.Generator().manual_seed(5)
    # Most best elements of half of the queries are barred, as those of a frame on which an object was hidden.
    best = similarity(*(t.unsqueeze(0) for t in (key, shrinkage, query[:, :100], selection[:, :100])))[0]
    near = torch.zeros(600).index_add_(0, best.topk(20, dim=0).indices.flatten(), torch.ones(2000)) > 8
    bars = [None, torch.rand(600, generator=g) < share, near]
    elements = coarsely_searchable(key.T.contiguous(), shrinkage[0]) if coarse else searchable(key, shrinkage)
    wanted = torch.arange(200) % 3 > 0
    together = search(elements, query, selection, 12, bars, wanted=[None, wanted, None])
    for (weights, index), bar, used in zip(together, bars, (None, wanted, None), strict=True):
        open_ = bar if bar is None else ~bar
        rest = torch.arange(600) if open_ is None else open_.nonzero().flatten()
        one, other = torch.zeros(2, 200, 600)
        one.scatter_add_(1, index, weights)
        if len(rest):
            alone = searchable(key[:, rest], shrinkage[:, rest])
            [(expected, place)] = search(alone, query, selection, 12, [None])
            other.scatter_add_(1, rest[place], expected)
        rows = slice(None) if used is None else used
        torch.testing.assert_close(one[rows], other[rows], rtol=0, atol=2e-3 if coarse else 1e-5)


def test_a_reader_content_with_fewer_elements_reads_the_best_that_it_may() -> None:
    key, shrinkage, query, selection = (t[0] for t in random_inputs(3, 300, 50, 16))
    scores = similarity(*(t.unsqueeze(0) for t in (key, shrinkage, query, selection)))[0].T
    bar = torch.arange(300) % 5 < 3
    elements = searchable(key, shrinkage)
    [(weights, index)] = search(elements, query, selection, 10, [bar], enough=[3])
    fewer = 0
    for row in range(50):
        best = [i for i in scores[row].topk(10).indices.tolist() if not bar[i]]
        if len(best) < 3:
            best = scores[row].masked_fill(bar, -math.inf).topk(10).indices.tolist()
        fewer += len(best) < 10
        assert set(index[row][weights[row] > 0].tolist()) <= set(best)
        expected = torch.softmax(scores[row][best], 0)
        torch.testing.assert_close(weights[row].sort().values[-len(best) :], expected.sort().values)
    assert 0 < fewer < 50


@pytest.mark.parametrize("queries", [1, 64, 150])
@pytest.mark.parametrize(("elements", "top_k"), [(900, 6), (40, 30), (20, 30), (3000, 30)])
def test_a_coarse_search_finds_the_same(queries: int, elements: int, top_k: int) -> None:
    key, shrinkage, query, selection = (t[0] for t in random_inputs(7, elements, queries, 32))
    bar = torch.arange(elements) < elements // 2
    bars = [None, bar, torch.ones(elements, dtype=torch.bool)]
    exact = search(searchable(key, shrinkage), query, selection, top_k, bars)
    found = search(coarsely_searchable(key.T.contiguous(), shrinkage[0]), query, selection, top_k, bars)
    for (weights, index), (expected_weights, expected_index) in zip(found, exact, strict=True):
        assert weights.shape == expected_weights.shape
        assert weights.dtype == torch.float32
        assert all(len(set(row)) == len(row) for row in index.tolist())
        one, other = (
            torch.zeros(queries, elements).scatter_(1, i, w)
            for i, w in ((index, weights), (expected_index, expected_weights))
        )
        # An element that bfloat16 overlooks is one that hardly weighs.
        assert (one - other).abs().sum(1).max() < 2e-3
        assert (one - other).abs().sum(1).mean() < 1e-4
    assert not found[2][0].any()
    read = found[1][0] > 0
    assert read.any(1).all()
    assert found[1][1][read].min() >= elements // 2


def test_similarity_has_the_gradients_of_its_definition() -> None:
    inputs = [t.requires_grad_() for t in random_inputs(5, 4, 3, 4)]
    weight = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad((similarity(*inputs) * weight).sum(), inputs)
    k, s, q, e = inputs
    distance = (e[:, :, None] * (k[..., None] - q[:, :, None]) ** 2).sum(1)
    expected = torch.autograd.grad((-s.mT / 2 * distance * weight).sum(), inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_readout_sums_each_objects_values() -> None:
    weights = torch.tensor([[[0.25], [0.75]]])  # 1, N=2, P=1
    values = torch.tensor([[[[4.0, 8.0]], [[0.0, 4.0]]]])  # 1, O=2, C=1, N=2
    assert readout(weights, values).flatten().tolist() == [7.0, 3.0]


@pytest.mark.parametrize("coarse", [False, True])
def test_a_reader_of_few_elements_finds_among_them_what_it_finds_among_all(
    coarse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, shrinkage, query, selection = (t[0] for t in random_inputs(4, 900, 150, 16))
    elements = coarsely_searchable(key.T.contiguous(), shrinkage[0]) if coarse else searchable(key, shrinkage)
    place = torch.arange(900)
    young = (place < 300) | ((place >= 340) & (place < 700))  # two spans are open to it
    single, scattered, none = place != 17, place % 3 > 0, place >= 0
    bars = [young, single, scattered, none, None]
    wanted = [None, None, place[:150] % 4 == 0, place[:150] < 0, None]
    apart = search(elements, query, selection, 12, bars, wanted=wanted)
    monkeypatch.setattr("xmem_core.attention._APART", 0.0)
    among_all = search(elements, query, selection, 12, bars, wanted=wanted)
    for (weights, index), (others, other_index) in zip(apart, among_all, strict=True):
        one, other = (
            torch.zeros(150, 900).scatter_add_(1, i, w) for i, w in ((index, weights), (other_index, others))
        )
        # In bfloat16 many scores are alike, so an element that hardly weighs may be another one.
        torch.testing.assert_close(one, other, rtol=0, atol=2e-3 if coarse else 0)
    assert not young[apart[0][1]].any()
    assert not apart[2][0][1::4].any()
    assert apart[2][0][::4].sum(1).allclose(torch.ones(38))


def test_scores_of_many_elements_are_computed_in_pieces_and_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(11)
    keys, shrinkage = torch.randn(32, 9000, generator=generator), torch.rand(1, 9000, generator=generator)
    memory = attention.searchable(keys, 1 + shrinkage)
    query, selection = (torch.rand(32, 77, generator=generator) for _ in range(2))
    pieces: list[int] = []
    in_pieces = attention._scores_in_pieces

    def noted(memory: attention.Searchable, q: Tensor, e: Tensor) -> Tensor:
        pieces.append(memory.scale.shape[-1])
        return in_pieces(memory, q, e)

    monkeypatch.setattr(attention, "_scores_in_pieces", noted)
    found = attention._scores(memory, query, selection)
    assert pieces == [9000]
    monkeypatch.setattr(attention, "_IN_PIECES_FROM", 9000)
    whole = attention._scores(memory, query, selection)
    assert len(pieces) == 1
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)
