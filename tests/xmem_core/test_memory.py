"""The memory compared with a simple oracle: reads, caps, and barred elements."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference.plain_memory import PlainMemory
from support.recorded import recorded
from torch import Tensor

from xmem_core.attention import search
from xmem_core.config import MemoryConfig
from xmem_core.memory import Memory

KEY_DIM, VALUE_DIM = 3, 2
IDS = (1, 2, 3, 4)


@st.composite
def configs(draw: st.DrawFn) -> MemoryConfig:
    long_term = draw(st.booleans())
    least = draw(st.integers(1, 3))
    most = draw(st.integers(least + 1, least + 4))
    prototypes = draw(st.integers(1, 7))
    return MemoryConfig(
        top_k=draw(st.integers(1, 9)),
        min_mid_term_frames=least,
        max_mid_term_frames=most if long_term or draw(st.booleans()) else None,
        num_prototypes=prototypes,
        max_long_term_elements=prototypes + draw(st.integers(1, 12)),
        enable_long_term=long_term,
        max_permanent_frames=draw(st.integers(1, 4)),
    )


# Mostly frames and readings: a removal empties most of what came before, and eviction needs a long life.
KINDS = ("frame",) * 12 + ("read",) * 8 + ("prompt",) * 4 + ("store", "remove", "doubt")
OPERATIONS = st.tuples(st.sampled_from(KINDS), st.frozensets(st.sampled_from(IDS), min_size=1, max_size=2))


class Pair:
    """The memory and the oracle, with the same input."""

    def __init__(self, config: MemoryConfig, positions: int, seed: int) -> None:
        self.config = config
        self.positions = positions
        self.rng = np.random.default_rng(seed)
        self.memory = Memory(config, positions, KEY_DIM, VALUE_DIM)
        self.plain = PlainMemory(config)
        self.time = -1

    def draw(self, *shape: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        return self.rng.normal(size=shape).astype(np.float32).astype(np.float64)

    def add_frame(self, given: frozenset[int]) -> None:
        self.time += 1 + int(self.rng.integers(3))
        ids = [*self.plain.objects, *sorted(given - set(self.plain.objects))]
        key, selection = self.draw(KEY_DIM, self.positions) / 2, self.draw(KEY_DIM, self.positions)
        shrinkage = 1 + self.draw(1, self.positions) ** 2
        selection = 1 / (1 + np.exp(-selection))
        values = {i: self.draw(VALUE_DIM, self.positions) for i in ids}
        self.plain.add_frame(key, shrinkage, selection, values, time=self.time, given=set(given))
        as_tensors = {i: torch.from_numpy(v).float() for i, v in values.items()}
        k, s, e = (torch.from_numpy(a).float() for a in (key, shrinkage, selection))
        self.memory.add_frame(self.time, k, s, e, as_tensors, given=given)

    def read(self) -> tuple[Tensor, Tensor]:
        queries = 1 + int(self.rng.integers(3))
        key = self.draw(KEY_DIM, queries) / 2
        selection = 1 / (1 + np.exp(-self.draw(KEY_DIM, queries)))
        expected = self.plain.read(key, selection)
        got = self.memory.read(torch.from_numpy(key).float(), torch.from_numpy(selection).float())
        return got.double(), torch.from_numpy(expected)

    def usages(self) -> tuple[Tensor, Tensor]:
        got = [self.memory.usage(region) for region in ("long_term", "permanent", "working")]
        expected = torch.tensor([e.usage for e in self.plain.pool()], dtype=torch.float64)
        return torch.cat(got).double(), expected

    def poison(self) -> None:
        """NaN in all unused elements, so that a read from them is detected."""
        free = torch.ones(self.memory.capacity, dtype=torch.bool)
        free[self.memory._used_rows()] = False
        for column in (*self.memory._columns.values(), *self.memory._values.values()):
            column[free] = float("nan") if column.is_floating_point() else 2**62


@pytest.mark.slow
@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    configs(),
    st.integers(1, 3),
    st.lists(OPERATIONS, min_size=10, max_size=60),
    st.integers(0, 2**32),
    st.booleans(),
)
def test_any_sequence_equals_the_oracle(
    config: MemoryConfig,
    positions: int,
    operations: list[tuple[str, frozenset[int]]],
    seed: int,
    poison: bool,
) -> None:
    pair = Pair(config, positions, seed)
    permanent = (config.max_permanent_frames - 1) * positions
    for name, ids in operations:
        alive = pair.plain.objects
        if name == "prompt" or (name == "frame" and not alive):
            pair.add_frame(ids)
        elif name == "frame":
            pair.add_frame(frozenset())
        elif name == "remove" and ids & set(alive):
            for side in (pair.memory, pair.plain):
                side.remove_objects(sorted(ids & set(alive)))
        elif name == "doubt":
            after = pair.time - int(pair.rng.integers(9))
            for object_id in sorted(ids & set(alive)):
                pair.memory.doubt(object_id, after)
                pair.plain.doubt(object_id, after)
        elif name == "store":
            pair.memory = Memory.restore(*pair.memory.export(), config)
        elif name == "read" and alive and all(any(i in e.values for e in pair.plain.pool()) for i in alive):
            if poison:
                pair.poison()
            got, expected = pair.read()
            # Decisions that hang on fp32's last bits may fall either way.
            assume(pair.plain.closest_call > 1e-5)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
        assume(pair.plain.closest_call > 1e-5)
        assert pair.memory.sizes == pair.plain.sizes
        assert list(pair.memory.first_time) == pair.plain.objects
        torch.testing.assert_close(*pair.usages(), rtol=1e-4, atol=1e-4)
        assert pair.memory.permanent.size <= permanent
        assert pair.memory.long_term.size <= (config.max_long_term_elements if config.enable_long_term else 0)
        if config.max_mid_term_frames is not None:
            assert pair.memory.working.size <= config.max_mid_term_frames * positions


def fill_frames(
    memory: Memory,
    count: int,
    ids: tuple[int, ...] = (1,),
    start: int = 0,
    given: tuple[int, ...] = (),
) -> None:
    """`count` frames. The value of an element is its time, in every channel."""
    for time in range(start, start + count):
        generator = torch.Generator().manual_seed(time)
        key = torch.randn(KEY_DIM, memory.positions, generator=generator)
        ones = torch.ones(1, memory.positions)
        value = torch.full((VALUE_DIM, memory.positions), float(time))
        memory.add_frame(time, key, ones, torch.ones_like(key), dict.fromkeys(ids, value), given=given)


def small_config(**changes: Any) -> MemoryConfig:
    values: dict[str, Any] = {
        "top_k": 4,
        "min_mid_term_frames": 2,
        "max_mid_term_frames": 4,
        "num_prototypes": 3,
        "max_long_term_elements": 8,
        "max_permanent_frames": 3,
    }
    return MemoryConfig(**(values | changes))


def test_nothing_is_allocated_after_the_first_frame() -> None:
    memory = Memory(small_config(), 4, KEY_DIM, VALUE_DIM)
    fill_frames(memory, 1)
    bytes_at_first = memory.nbytes
    places = {name: column.data_ptr() for name, column in memory._columns.items()}
    for block in range(20):
        fill_frames(memory, 5, start=1 + 5 * block)
        memory.read(torch.zeros(KEY_DIM, 2), torch.ones(KEY_DIM, 2))
        assert memory.nbytes == bytes_at_first
    assert {name: column.data_ptr() for name, column in memory._columns.items()} == places


def test_unlimited_working_memory_grows_and_keeps_every_frame() -> None:
    config = small_config(enable_long_term=False, max_mid_term_frames=None)
    memory = Memory(config, 2, KEY_DIM, VALUE_DIM)
    fill_frames(memory, 50)
    assert memory.sizes == (100, 0)
    assert memory._columns["time"][memory.working.used].tolist() == [t for t in range(50) for _ in range(2)]
    assert memory._values[1][memory.working.used][:, 0].tolist() == [t for t in range(50) for _ in range(2)]


def test_without_long_term_the_first_frame_and_the_newest_stay() -> None:
    memory = Memory(small_config(enable_long_term=False), 2, KEY_DIM, VALUE_DIM)
    fill_frames(memory, 20)
    assert [f.time for f in memory.frames] == [0, 17, 18, 19]
    assert memory.sizes == (8, 0)


def test_evicted_of_equally_used_elements_are_the_oldest() -> None:
    # Never read, so every usage is the same 0.
    memory = Memory(small_config(), 1, KEY_DIM, VALUE_DIM)
    fill_frames(memory, 30)
    assert memory._columns["time"][memory.long_term.used].tolist() == [22, 23, 24, 25, 26, 27, 28]


def test_prototypes_are_as_many_as_candidates_where_these_are_fewer() -> None:
    memory = Memory(small_config(num_prototypes=7, max_long_term_elements=20), 1, KEY_DIM, VALUE_DIM)
    fill_frames(memory, 4)  # the first stays, the newest stays, two are candidates
    assert memory.sizes == (2, 2)


def test_of_one_objects_corrections_the_newest_stay_whole_and_the_others_are_consolidated() -> None:
    memory = Memory(small_config(max_long_term_elements=100), 2, KEY_DIM, VALUE_DIM)
    fill_frames(memory, 30, given=(1,))
    assert memory.frames[0].time == 0
    assert memory.frames[0].anchor
    assert memory.permanent.size == 2 * 2
    held = [f.time for f in memory.permanent_frames]
    assert held == [memory.frames[1].time - 2, memory.frames[1].time - 1]
    assert memory._columns["time"][memory.permanent.used].tolist() == [t for t in held for _ in range(2)]
    consolidated = memory._columns["time"][memory.long_term.used].tolist()
    assert consolidated == [t for t in range(1, held[0]) for _ in range(2)]


def given_one_by_one(config: MemoryConfig, objects: int, removed: tuple[int, ...] = ()) -> Memory:
    """Objects 1, 2, ... prompted 4 memory frames apart; those of `removed` are removed before the next."""
    memory = Memory(config, 2, KEY_DIM, VALUE_DIM)
    for k in range(objects):
        ids = tuple(i for i in range(1, k + 2) if i not in removed or i == k + 1)
        fill_frames(memory, 1, ids, start=4 * k, given=(k + 1,))
        fill_frames(memory, 3, ids, start=4 * k + 1)
        if k + 1 in removed:
            memory.remove_objects([k + 1])
    return memory


def whole(memory: Memory) -> list[int]:
    """Times of all frames that are kept whole and on which a living object was prompted."""
    return [f.time for f in (*memory.permanent_frames, *memory.frames) if f.given]


def test_of_more_given_objects_than_places_none_loses_its_given_frame() -> None:
    """Eight objects, each prompted once: earlier, the second to fourth had lost their masks."""
    memory = given_one_by_one(small_config(max_long_term_elements=1000, max_permanent_frames=5), 8)
    long_term = memory._columns["time"][memory.long_term.used].tolist()
    assert len(memory.permanent_frames) == 4
    for object_id, first in memory.first_time.items():
        assert first in whole(memory) or long_term.count(first) == 2, (object_id, first)
        assert (memory._values[object_id][memory.long_term.used][:, 0].round() == first).any() or (
            first in whole(memory)
        )


def test_frames_of_dead_objects_leave_first() -> None:
    config = small_config(max_long_term_elements=1000, max_permanent_frames=5)
    memory = given_one_by_one(config, 8, removed=(3, 5, 6))
    assert sorted(memory.first_time) == [1, 2, 4, 7, 8]
    assert set(whole(memory)) == set(memory.first_time.values())
    assert not {8, 16, 20} & set(memory._columns["time"][memory.long_term.used].tolist())


def test_a_frame_whose_object_was_given_again_leaves_before_an_only_one() -> None:
    memory = Memory(small_config(enable_long_term=False), 2, KEY_DIM, VALUE_DIM)
    fill_frames(memory, 1, given=(1,))
    fill_frames(memory, 1, (1, 2), start=1, given=(2,))
    for start in range(2, 40, 4):  # object 1 is corrected, on and on
        fill_frames(memory, 1, (1, 2), start=start, given=(1,))
        fill_frames(memory, 3, (1, 2), start=start + 1)
    assert [f.time for f in memory.permanent_frames] == [1, 38]
    again = Memory.restore(*memory.export(), memory.config)
    assert again.permanent_frames == memory.permanent_frames
    assert again.frames == memory.frames


def test_what_is_doubted_of_a_given_frame_is_no_reason_to_keep_it() -> None:
    memory = Memory(small_config(enable_long_term=False, max_permanent_frames=2), 2, KEY_DIM, VALUE_DIM)
    fill_frames(memory, 1, given=(1,))
    fill_frames(memory, 1, (1, 2), start=1, given=(2,))
    fill_frames(memory, 5, (1, 2), start=2)
    assert [f.time for f in memory.permanent_frames] == [1]
    memory.doubt(2, after=0)
    fill_frames(memory, 1, (1, 2, 3), start=7, given=(3,))
    fill_frames(memory, 5, (1, 2, 3), start=8)
    assert [f.time for f in memory.permanent_frames] == [7]


def test_without_long_term_memory_what_is_forgotten_is_said(caplog: pytest.LogCaptureFixture) -> None:
    config = small_config(enable_long_term=False, max_permanent_frames=3)
    memory = given_one_by_one(config, 3)
    fill_frames(memory, 4, (1, 2, 3), start=12)
    assert [f.time for f in memory.permanent_frames] == [4, 8]
    assert not caplog.records
    memory = given_one_by_one(config, 4)
    fill_frames(memory, 4, (1, 2, 3, 4), start=16)
    assert [f.time for f in memory.permanent_frames] == [8, 12]
    (record,) = caplog.records
    assert "masks given of objects [2] at time 4 are forgotten" in record.getMessage()
    assert "max_permanent_frames=3" in record.getMessage()


def test_a_memory_stored_before_the_given_objects_were_is_read() -> None:
    memory = given_one_by_one(small_config(max_long_term_elements=1000), 4)
    fill_frames(memory, 1, (1, 2, 3, 4), start=16, given=(2,))
    tensors, facts = memory.export()
    del facts["given"]
    again = Memory.restore(tensors, facts, memory.config)
    by_time = {f.time: f.given for f in (*again.permanent_frames, *again.frames)}
    assert {t: ids for t, ids in by_time.items() if ids} == {
        0: (1,), 8: (3,), 12: (4,), 16: (1, 2, 3, 4),
    }  # fmt: skip


def test_an_id_that_returns_reads_nothing_of_its_predecessor() -> None:
    memory = Memory(small_config(), 2, KEY_DIM, VALUE_DIM)
    fill_frames(memory, 9, ids=(1, 2))
    memory.remove_objects([2])
    again = torch.full((VALUE_DIM, 2), 1000.0)
    own = torch.zeros(VALUE_DIM, 2)
    key = torch.randn(KEY_DIM, 2, generator=torch.Generator().manual_seed(99))
    memory.add_frame(9, key, torch.ones(1, 2), torch.ones_like(key), {1: own, 2: again}, given=[2])
    read = memory.read(torch.zeros(KEY_DIM, 3), torch.ones(KEY_DIM, 3))
    assert list(memory.first_time) == [1, 2]
    torch.testing.assert_close(read[1], torch.full((VALUE_DIM, 3), 1000.0))


def test_elements_of_removed_objects_alone_are_freed() -> None:
    memory = Memory(small_config(max_mid_term_frames=9), 2, KEY_DIM, VALUE_DIM)
    fill_frames(memory, 3, ids=(1,))
    fill_frames(memory, 2, ids=(1, 2), start=3)
    memory.remove_objects([1])
    assert memory.sizes == (4, 0)
    assert [f.time for f in memory.frames] == [3, 4]
    memory.remove_objects([2])
    assert memory.sizes == (0, 0)
    with pytest.raises(RuntimeError, match="nothing to read"):
        memory.read(torch.zeros(KEY_DIM, 1), torch.ones(KEY_DIM, 1))


def test_objects_that_come_together_share_one_search(monkeypatch: pytest.MonkeyPatch) -> None:
    searches: list[Any] = []
    monkeypatch.setattr("xmem_core.memory.search", recorded(search, searches, -1))
    memory = Memory(small_config(max_mid_term_frames=9), 2, KEY_DIM, VALUE_DIM)
    fill_frames(memory, 2, ids=(1, 2, 3))
    fill_frames(memory, 2, ids=(1, 2, 3, 4, 5), start=2)
    memory.read(torch.zeros(KEY_DIM, 1), torch.ones(KEY_DIM, 1))
    assert len(searches) == 1
    assert [None if bar is None else bar.tolist() for bar in searches[0]] == [None, [True] * 4 + [False] * 4]


def test_what_is_doubted_of_one_object_is_read_for_the_others() -> None:
    memory = Memory(small_config(max_mid_term_frames=9, top_k=1), 1, KEY_DIM, VALUE_DIM)
    fill_frames(memory, 6, ids=(1, 2))
    key = memory._columns["key"][memory.working.used].T.clone()
    memory.doubt(2, after=2)
    for again in (memory, Memory.restore(*memory.export(), memory.config)):
        got = again.read(key, torch.ones_like(key))[:, 0].round().long().tolist()
        assert got[0] == [0, 1, 2, 3, 4, 5]
        assert set(got[1]) <= {0, 1, 2}
        assert got[1][:3] == [0, 1, 2]
    memory.doubt(2, after=5)  # of which nothing is remembered
    assert memory.doubted == {2: [(3, 5)]}
    memory.remove_objects([2])
    assert memory.doubted == {}


def test_a_frame_on_which_an_object_was_hidden_is_read_for_the_others_only() -> None:
    memory = Memory(small_config(max_mid_term_frames=9), 2, KEY_DIM, VALUE_DIM)
    for t in range(7):
        fill_frames(memory, 1, (1, 2), start=t)
        memory.bar_last([1] if t in (2, 3, 5) else [])
    assert memory.doubted == {1: [(2, 3), (5, 5)]}
    tensors, facts = memory.export()
    assert Memory.restore(tensors, facts, memory.config).doubted == memory.doubted
    query = memory._columns["key"][memory.working.used][2 * 5 : 2 * 6].T
    first, second = memory.read(query, torch.ones_like(query))
    assert not torch.equal(first, second)
    memory.bar_last([2])
    memory.doubt(1, 1)
    assert memory.doubted == {1: [(2, 6)], 2: [(6, 6)]}


@pytest.mark.parametrize("coarse", [False, True])
def test_an_object_is_read_only_where_it_is_wanted(coarse: bool) -> None:
    memory = Memory(small_config(max_mid_term_frames=9), 4, KEY_DIM, VALUE_DIM)
    for t in range(6):
        fill_frames(memory, 1, (1, 2, 3), start=t)
        memory.bar_last([1] if t in (2, 3) else [])
    query = torch.randn(KEY_DIM, 7, generator=torch.Generator().manual_seed(0))
    wanted = {1: torch.arange(7) < 3, 2: torch.arange(7) > 4}
    selection = torch.ones_like(query)
    everywhere = memory.read(query, selection, coarse=coarse)
    got = memory.read(query, selection, coarse=coarse, wanted=wanted)
    for k, i in enumerate((1, 2, 3)):
        where = wanted.get(i, torch.zeros(7, dtype=torch.bool))
        assert torch.equal(got[k], everywhere[k] * where)


def test_spans_of_hidden_frames_leave_with_their_elements() -> None:
    config = small_config(enable_long_term=False, max_mid_term_frames=3)
    memory = Memory(config, 2, KEY_DIM, VALUE_DIM)
    for t in range(30):
        fill_frames(memory, 1, start=t)
        memory.bar_last([1] if t % 2 else [])
    assert len(memory.doubted[1]) <= 2


def test_spans_of_doubt_do_not_pile_up() -> None:
    """Half of the frames are doubted at once, continuously; spans are dropped with their frames."""
    memory = Memory(small_config(), 2, KEY_DIM, VALUE_DIM)
    for start in range(0, 400, 2):
        fill_frames(memory, 2, start=start)
        memory.doubt(1, after=start)
        memory.doubt(1, after=start)
        held = memory.working.size + memory.permanent.size + memory.long_term.size
        assert len(memory.doubted[1]) <= held
    assert memory.doubted[1][-1] == (399, 399)
    spans = memory.doubted[1]
    memory.doubt(1, after=spans[0][0] - 1)
    assert memory.doubted[1] == [(spans[0][0], 399)]


def test_an_object_of_which_all_is_doubted_reads_nothing() -> None:
    memory = Memory(small_config(), 2, KEY_DIM, VALUE_DIM)
    fill_frames(memory, 7, ids=(1, 2))
    memory.doubt(1, after=-1)
    read = memory.read(torch.zeros(KEY_DIM, 3), torch.ones(KEY_DIM, 3))
    assert read[0].abs().max() == 0
    assert read[1].abs().max() > 0


def test_a_reading_may_leave_use_uncounted() -> None:
    memory = Memory(small_config(), 2, KEY_DIM, VALUE_DIM)
    fill_frames(memory, 3)
    before = [c.clone() for c in memory._columns.values()]
    first = memory.read(torch.zeros(KEY_DIM, 3), torch.ones(KEY_DIM, 3), count_use=False)
    assert all(torch.equal(a, b) for a, b in zip(before, memory._columns.values(), strict=True))
    assert torch.equal(memory.read(torch.zeros(KEY_DIM, 3), torch.ones(KEY_DIM, 3)), first)
    assert not torch.equal(before[4], memory._columns["life"])


GOOD: dict[str, Any] = {
    "time": 5,
    "key": torch.zeros(KEY_DIM, 2),
    "shrinkage": torch.ones(1, 2),
    "selection": torch.ones(KEY_DIM, 2),
    "values": {1: torch.zeros(VALUE_DIM, 2)},
}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"values": {2: torch.zeros(VALUE_DIM, 2)}}, r"objects \[1\] have no value"),
        ({"time": 1}, "time 1 is not after"),
        ({"key": torch.zeros(KEY_DIM, 3)}, "key of shape"),
        ({"shrinkage": torch.ones(2)}, "shrinkage of shape"),
        ({"selection": torch.ones(KEY_DIM + 1, 2)}, "selection of shape"),
        ({"values": {1: torch.zeros(VALUE_DIM, 3)}}, "value of object 1 of shape"),
        ({"values": GOOD["values"] | {2: torch.zeros(1, 2)}}, "value of object 2 of shape"),
        ({"given": [1, 3]}, r"objects \[3\] are given at time 5 and have no value"),
    ],
)
def test_input_that_does_not_fit_changes_nothing(changes: dict[str, Any], says: str) -> None:
    memory = Memory(small_config(), 2, KEY_DIM, VALUE_DIM)
    fill_frames(memory, 2)
    before, facts = memory.export()
    with pytest.raises(ValueError, match=says):
        memory.add_frame(**(GOOD | changes))
    after, facts_after = memory.export()
    assert facts == facts_after
    assert all(torch.equal(before[name], after[name]) for name in before)
    memory.add_frame(**GOOD)
    assert memory.sizes == (6, 0)


def test_restore_refuses_facts_that_contradict_its_tensors() -> None:
    memory = Memory(small_config(), 2, KEY_DIM, VALUE_DIM)
    fill_frames(memory, 3)
    tensors, facts = memory.export()
    with pytest.raises(ValueError, match="do not make"):
        Memory.restore(tensors, facts | {"sizes": [0, 0, 4]}, memory.config)
    with pytest.raises(ValueError, match="do not fit a region"):
        Memory.restore(tensors, facts | {"sizes": [9, 0, 6]}, memory.config)


def test_a_memory_may_be_read_in_either_way_at_any_time() -> None:
    memory = Memory(small_config(max_mid_term_frames=6), 40, KEY_DIM, VALUE_DIM)
    fill_frames(memory, 4, ids=(1, 2))
    generator = torch.Generator().manual_seed(99)
    query, selection = (
        torch.randn(KEY_DIM, 7, generator=generator),
        torch.rand(KEY_DIM, 7, generator=generator),
    )
    exact = memory.read(query, selection)
    for coarse in (True, True, False, True):
        got = memory.read(query, selection, coarse=coarse)
        torch.testing.assert_close(got, exact, rtol=0, atol=0 if not coarse else 1e-3)
    fill_frames(memory, 1, ids=(1, 2), start=4)
    later = memory.read(query, selection, coarse=True)
    torch.testing.assert_close(later, memory.read(query, selection), rtol=0, atol=1e-3)
    assert not torch.equal(later, exact)
