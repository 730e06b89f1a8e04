"""Answers of ranks that are not there: sizes, this rank's own rows, sums that are multiples."""

import numpy as np
import pytest
import torch
from torch import distributed as dist

from foreroute.engine.parallel.collectives import ExpertGroupComm
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.replay.answers import alone_as, fill
from foreroute.engine.testing.ranks import run_ranks


def filled(sent, got_splits, sent_splits, rank):
    got_RD = torch.full((sum(got_splits), sent.shape[1]), float("nan"))
    fill(got_RD, sent, got_splits, sent_splits, rank)
    return got_RD


def test_the_example():
    sent_SD = torch.tensor([[1.0], [2.0], [3.0]])
    assert filled(sent_SD, [1, 4], [1, 2], 0).flatten().tolist() == [1, 2, 3, 1, 2]


@pytest.mark.parametrize("seed", range(8))
def test_own_rows_are_own_and_all_others_are_sent_ones(seed):
    draw = np.random.default_rng(seed)
    sent_splits, rank = draw.integers(0, 5, 4), int(draw.integers(0, 4))
    got_splits = draw.integers(0, 9, 4)
    got_splits[rank] = sent_splits[rank]
    sent_SD = torch.from_numpy(draw.normal(size=(sent_splits.sum(), 3)).astype(np.float32))
    found_RD = filled(sent_SD, got_splits.tolist(), sent_splits.tolist(), rank)
    own = int(got_splits[:rank].sum()), int(sent_splits[:rank].sum())
    number = int(sent_splits[rank])
    assert torch.equal(found_RD[own[0] : own[0] + number], sent_SD[own[1] : own[1] + number])
    rows = {tuple(row) for row in sent_SD.tolist()}
    assert {tuple(row) for row in found_RD.tolist()} <= rows | ({(0.0, 0.0, 0.0)} if not rows else set())


def test_a_rank_that_sends_nothing_receives_zeros():
    assert filled(torch.empty(0, 2), [3, 0], [0, 0], 1).tolist() == [[0.0, 0.0]] * 3


def collectives(_, stage):
    dist.destroy_process_group()
    with alone_as(Mesh(5, 8, 4), stage):
        group = dist.new_group([4, 5, 6, 7])
        others = dist.new_group([0, 1])
        comm = ExpertGroupComm(group)
        total = torch.tensor([1.0, 2.0])
        dist.all_reduce(total)
        most = torch.tensor([3.0])
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        whole = torch.arange(8.0)
        dist.all_gather_into_tensor(whole, whole[2:4], group=group)
        parts = [torch.zeros(2) for _ in range(4)]
        dist.all_gather(parts, torch.tensor([5.0, 6.0]), group=group)
        rows_RD = comm.all_to_all(torch.ones(6, 2), (1, 2, 0, 3), (4, 2, 5, 1)).wait()
        summed = torch.zeros(2)
        dist.reduce_scatter_tensor(summed, torch.arange(8.0), group=group)
        dist.barrier()
        return {
            "place": (dist.get_rank(), dist.get_world_size(), comm.rank, comm.ranks, others is not None),
            "all_reduce": total.tolist(),
            "max": most.tolist(),
            "gathered in place": whole.tolist(),
            "gathered": torch.stack(parts).tolist(),
            "rows": list(rows_RD.shape),
            "sent": comm.sent_bytes_P,
            "summed": summed.tolist(),
        }


@pytest.mark.parametrize("stage", [1, 3])
def test_every_collective_returns_with_the_sizes_of_the_run(stage):
    (found,) = run_ranks(collectives, 1, stage)
    assert found["place"][:4] == (5, 8, 1, 4)
    assert found["all_reduce"] == [8.0, 16.0] and found["max"] == [3.0]
    kept = [float(i) for i in range(8)]
    assert found["gathered in place"] == (kept if stage == 1 else [2.0, 3.0] * 4)
    assert found["gathered"] == [[5.0, 6.0]] * 4
    assert found["rows"] == [12, 2]
    assert found["sent"] == [8, 0, 0, 24]  # own rows stay
    assert found["summed"] == [8.0, 12.0]  # numbers 2 and 3, of four ranks
