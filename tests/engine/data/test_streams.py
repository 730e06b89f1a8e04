import itertools

import numpy as np
import pytest
import torch

from foreroute.engine.data.streams import EvalShares, Streams, eval_batches, warm_symbols
from foreroute.engine.errors import UserError

SOME_IDS = np.random.default_rng(0).integers(1, 256, 307, dtype=np.uint8)  # no 0: padding shows


def plain_batch(ids, streams, segment, context, index, wanted):
    length = len(ids) // streams
    per_epoch = (length - 1) // segment
    at = index % per_epoch * segment
    inputs, targets, left = [], [], []
    for s in wanted:
        stream = [int(i) for i in ids[s * length : (s + 1) * length]]
        inputs.append(stream[at : at + segment])
        targets.append(stream[at + 1 : at + segment + 1])
        left.append([stream[at - j] if at - j >= 0 else 0 for j in range(context, 0, -1)])
    return inputs, targets, left


@pytest.mark.parametrize("streams, segment, context", [(1, 5, 2), (4, 8, 0), (7, 1, 3), (3, 50, 1)])
def test_batches_equal_plain_loop(streams, segment, context):
    layout = Streams(SOME_IDS, streams, segment, context)
    for index in range(2 * layout.segments_per_epoch + 1):
        batch = layout.batch(index, range(streams))
        inputs, targets, left = plain_batch(SOME_IDS, streams, segment, context, index, range(streams))
        assert batch.ids_BQ.tolist() == inputs
        assert batch.targets_BQ.tolist() == targets
        assert batch.left_BC.tolist() == left
        assert batch.left_BC.shape == (streams, context)
        assert batch.stream_B.tolist() == list(range(streams))
        assert batch.index == index
        assert batch.fresh == (index % layout.segments_per_epoch == 0)
        assert {t.dtype for t in (batch.ids_BQ, batch.targets_BQ, batch.left_BC)} == {torch.int64}


@pytest.mark.parametrize("start, first", [(0.0, 0), (0.2, 2), (0.5, 6), (0.99, 11)])
def test_streams_that_start_elsewhere_read_the_same_epoch_in_another_order(start, first):
    layout, moved = Streams(SOME_IDS, 4, 6, 1), Streams(SOME_IDS, 4, 6, 1, start)
    assert layout.segments_per_epoch == 12
    for index in range(26):
        batch, same = moved.batch(index, range(4)), layout.batch(index + first, range(4))
        assert torch.equal(batch.ids_BQ, same.ids_BQ) and torch.equal(batch.left_BC, same.left_BC)
        assert batch.fresh == ((index + first) % 12 == 0) and batch.index == index


def test_ranks_together_read_what_one_rank_reads():
    layout = Streams(SOME_IDS, 12, 4, 2)
    whole = layout.batch(5, range(12))
    for world, accumulation in [(1, 1), (2, 3), (3, 2), (4, 3), (12, 1)]:
        parts = [
            layout.batch(5, layout.streams_of(r, m, world=world, accumulation=accumulation))
            for r in range(world)
            for m in range(accumulation)
        ]
        for name in ("ids_BQ", "targets_BQ", "left_BC", "stream_B"):
            joined = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(joined, getattr(whole, name))


def test_streams_of_worked_example():
    layout = Streams(SOME_IDS, 8, 4, 2)
    table = [[list(layout.streams_of(r, m, world=2, accumulation=2)) for m in range(2)] for r in range(2)]
    assert table == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    with pytest.raises(ValueError, match="streams=8: not a multiple of 3 x 1"):
        layout.streams_of(0, 0, world=3, accumulation=1)
    with pytest.raises(ValueError, match="rank=2 of 2"):
        layout.streams_of(2, 0, world=2, accumulation=1)


def test_dropped_symbols_worked_example_and_plain_count():
    assert Streams(SOME_IDS[:23], 2, 4, 2).dropped_symbols == 5
    for streams, segment in [(2, 4), (5, 7), (1, 306), (3, 101)]:
        numbered = np.arange(255, dtype=np.uint8)[:251]
        if len(numbered) < streams * (segment + 1):
            continue
        layout = Streams(numbered, streams, segment, 1)
        seen = set()
        for index in range(layout.segments_per_epoch):
            batch = layout.batch(index, range(streams))
            seen |= set(batch.ids_BQ.flatten().tolist() + batch.targets_BQ.flatten().tolist())
        assert layout.dropped_symbols == len(numbered) - len(seen)


def test_too_short_for_its_streams_names_the_numbers():
    Streams(SOME_IDS[:54], 9, 5, 2)  # just enough
    with pytest.raises(UserError, match=r"streams=9.*segment=5.*9 x \(5 \+ 1\) = 54.* has 53"):
        Streams(SOME_IDS[:53], 9, 5, 2)


def test_eval_worked_example():
    shares = EvalShares(20, 3, 2, 3)
    assert (shares.warm_up, shares.stride, shares.streams, shares.num_segments) == (4, 6, 3, 5)
    ids = np.arange(100, 120, dtype=np.uint8)
    counted = [[], [], []]
    for batch, counted_BQ in eval_batches(ids, 99, shares, 2):
        for i in range(3):
            counted[i] += batch.targets_BQ[i][counted_BQ[i]].tolist()
    assert counted == [list(range(100, 110)), list(range(110, 116)), list(range(116, 120))]


SHARES = list(itertools.product([1, 2, 7, 20, 64, 65, 250], [1, 2, 3, 8, 40], [1, 4, 7], [0, 3, 8, 30]))


@pytest.mark.parametrize("length", [1, 2, 7, 20, 64, 65, 250])
def test_each_symbol_counted_once_with_its_true_past(length):
    context, previous = 3, 255
    ids = np.arange(length, dtype=np.uint8) + 1
    past = [0, 0, 0, previous, *ids.tolist()]  # input of position p is past[p + context]
    for n, streams, segment, warm in SHARES:
        if n != length:
            continue
        shares = EvalShares(n, streams, segment, warm)
        assert 1 <= shares.streams <= streams
        times = [0] * n
        batches = list(eval_batches(ids, previous, shares, context))
        assert [batch.fresh for batch, _ in batches] == [True] + [False] * (len(batches) - 1)
        for (batch, counted_BQ), i in itertools.product(batches, range(shares.streams)):
            start = i * shares.stride + batch.index * segment
            assert start % segment == 0
            offset = batch.index * segment
            for q in range(segment):
                p = start + q
                warmed = i == 0 or offset + q >= warm
                assert not counted_BQ[i, q] or (p < n and warmed)
                if p < n:
                    assert batch.ids_BQ[i, q] == past[p + context]
                    assert batch.targets_BQ[i, q] == ids[p]
                    times[p] += int(counted_BQ[i, q])
                else:
                    assert batch.targets_BQ[i, q] == 0
            if start <= n:
                assert batch.left_BC[i].tolist() == past[start : start + context]
        assert times == [1] * n, (n, streams, segment, warm)


def test_every_stream_counts_something_and_a_short_split_uses_fewer():
    for n, streams, segment, warm in SHARES:
        shares = EvalShares(n, streams, segment, warm)
        counts = torch.stack([c.sum(1) for _, c in eval_batches(np.ones(n, np.uint8), 0, shares, 0)]).sum(0)
        assert (counts > 0).all()
    assert EvalShares(30, 8, 4, 100).streams == 1
    assert EvalShares(1000, 8, 4, 100).streams == 8


def times_counted(shares):
    times = [0] * shares.num_symbols
    for batch, counted_BQ in eval_batches(np.zeros(shares.num_symbols, np.uint8), 0, shares, context=0):
        for i, q in counted_BQ.nonzero().tolist():
            times[i * shares.stride + batch.index * shares.segment + q] += 1
    return times


@pytest.mark.parametrize("name, shift", [("stride", 4), ("stride", -4), ("warm_up", -4)])
def test_counting_check_sees_a_wrong_layout(monkeypatch, name, shift):
    shares = EvalShares(250, 3, 4, 8)
    assert times_counted(shares) == [1] * 250
    wrong = getattr(shares, name) + shift
    needed = {"streams": shares.streams, "num_segments": shares.num_segments}
    for key, value in {**needed, name: wrong}.items():
        monkeypatch.setattr(EvalShares, key, value)
    assert times_counted(shares) != [1] * 250


def test_shares_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"len\(ids\)=3: shares were made for 4"):
        next(eval_batches(np.zeros(3, np.uint8), 0, EvalShares(4, 1, 2, 0), 0))
    with pytest.raises(UserError, match="empty"):
        EvalShares(0, 1, 2, 0)


@pytest.mark.parametrize("layers, memory, segment", [(3, 8, 4), (3, 6, 4), (4, 3, 8), (2, 0, 4)])
def test_warm_symbols_covers_the_memory_of_a_stack(layers, memory, segment):
    """Follow by hand how far left of a segment the outputs of the top layer can reach."""
    start = 1000 * segment
    reach = start
    for _ in range(layers):
        reach = reach // segment * segment - memory
    assert start - warm_symbols(layers, memory, segment) <= reach


def test_layers_times_memory_is_not_enough_when_memory_is_no_multiple():
    start = reach = 4000
    for _ in range(3):
        reach = reach // 4 * 4 - 6
    assert start - 3 * 6 > reach
