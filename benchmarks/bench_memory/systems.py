"""One table in several systems, for benchmarks/bench_memory: what a step of it costs, and that all compute the same.

    planned      engine/ngram_tables: distinct rows there, summed gradients back, all known ahead
    replicated   the whole table on every rank, its dense gradient averaged, torch's fused Adam
    sparse       the same with sparse gradients and torch.optim.SparseAdam
    torchrec     TorchRec's EmbeddingCollection, its rows shared out over the ranks, FBGEMM's kernels on the CPU
    torchrec_distinct   the same after torch.unique in the step: each rank asks for a row once (TorchRec's own option,
                 use_index_dedup, has no kernel on a CPU)

A step reads the vectors of a rank's tokens, computes their product with a fixed tensor, and changes the rows. Adam's
rules differ between systems, and FBGEMM has none of them on a CPU: TorchRec is timed with row-wise Adagrad, which keeps
and computes less. For the check all have plain gradient descent.

Letters: T tokens, W width of a row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist

from benchmarks.bench_memory.problem import BATCHES, Table, Text
from foreroute.engine.ngram_tables.row_rules import RowAdam, RowSGD
from foreroute.engine.ngram_tables.sharded import ShardedTable
from foreroute.engine.ngram_tables.store import RowStore
from foreroute.engine.parallel.collectives import ExpertGroupComm
from foreroute.engine.parallel.cpu_group import GlooGroup
from foreroute.engine.routing.plans.row_plan import plan_rows

RATE = 0.01
SCALE = 0.02


@dataclass(frozen=True)
class Case:
    """A table and the batches that this rank reads of it."""

    table: Table
    text: Text
    cotangent_TW: Tensor
    plain: bool  # plain gradient descent, for the check

    def rows(self) -> list[Tensor]:
        """Return the rows [T] that each batch reads."""
        place = dist.get_rank(), dist.get_world_size()
        return [torch.from_numpy(self.text.rows(self.table, *place, number)) for number in range(BATCHES)]


class System(Protocol):
    """A table in training."""

    def step(self, batch: int) -> Tensor:
        """Run one step on a batch and return the vectors that it read, [T, W]."""
        ...


def initial(table: Table, rank: int = 0, world: int = 1, rule: Any = None) -> RowStore:
    """Return a rank's rows with the initial values that all systems begin with."""
    placed = {"rank": rank, "world": world, "seed": 0, "index": 0, "scale": SCALE}
    return RowStore(table.rows, table.width, **placed, rule=rule or RowSGD())  # type: ignore[arg-type]


class Planned:
    """Ours; the plans are made beforehand, as the loader does it."""

    def __init__(self, case: Case) -> None:
        place = dist.get_rank(), dist.get_world_size()
        store = initial(case.table, *place, rule=RowSGD() if case.plain else RowAdam())
        self.table, self.case = ShardedTable(store, ExpertGroupComm(dist.group.WORLD)), case
        hosts, keys = GlooGroup(dist.new_group()), case.text.keys(case.table)
        batches = [case.text.batch(case.table, *place, number) for number in range(BATCHES)]
        self.planned = [plan_rows((keys,), [batch], hosts)[0] for batch in batches]
        self.steps, self.keep = 0, torch.tensor(True)

    def step(self, batch: int) -> Tensor:
        planned = self.planned[batch]
        self.table.fetch(planned.plans[0])
        vector_TW = F.embedding(planned.landed_BQH[0].flatten(), self.table.landed())
        (vector_TW * self.case.cotangent_TW).sum().backward()
        self.table.return_gradients()
        grad_UW = self.table.summed_gradients() / dist.get_world_size()
        self.steps += 1
        self.table.update(grad_UW, step=self.steps, lr=RATE, keep=self.keep)
        return vector_TW.detach()


class Replicated:
    """The whole table on every rank."""

    def __init__(self, case: Case, *, sparse: bool = False) -> None:
        self.embedding = nn.Embedding(case.table.rows, case.table.width, sparse=sparse)
        weight, self.case = self.embedding.weight, case
        if case.plain:  # otherwise its own initial values do
            weight.data.copy_(initial(case.table).state["value"])
        self.optimizer: torch.optim.Optimizer
        if case.plain:
            self.optimizer = torch.optim.SGD([weight], lr=RATE)
        elif sparse:
            self.optimizer = torch.optim.SparseAdam([weight], lr=RATE)
        else:
            self.optimizer = torch.optim.Adam([weight], lr=RATE, fused=True)
        self.row_T = case.rows()

    def step(self, batch: int) -> Tensor:
        vector_TW: Tensor = self.embedding(self.row_T[batch])
        (vector_TW * self.case.cotangent_TW / dist.get_world_size()).sum().backward()
        weight = self.embedding.weight
        assert weight.grad is not None
        weight.grad = weight.grad.coalesce() if weight.grad.is_sparse else weight.grad
        dist.all_reduce(weight.grad)
        self.optimizer.step()
        weight.grad = None
        return vector_TW.detach()


class TorchRec:
    """TorchRec's sharded table."""

    def __init__(self, case: Case, *, distinct: bool = False) -> None:
        import torchrec
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from torchrec.distributed import DistributedModelParallel, ShardingEnv
        from torchrec.distributed.embedding import EmbeddingCollectionSharder
        from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
        from torchrec.distributed.types import ShardingPlan

        self.case, table = case, case.table
        config = torchrec.EmbeddingConfig(
            name="table", embedding_dim=table.width, num_embeddings=table.rows, feature_names=["ngram"]
        )
        collection = torchrec.EmbeddingCollection(tables=[config], device=torch.device("meta"))
        rule = EmbOptimType.EXACT_SGD if case.plain else EmbOptimType.EXACT_ROWWISE_ADAGRAD
        sharder = EmbeddingCollectionSharder({"optimizer": rule, "learning_rate": RATE})
        world, device = dist.get_world_size(), torch.device("cpu")
        own = construct_module_sharding_plan(
            collection, {"table": row_wise(compute_kernel="fused")}, sharder, world, world, device.type
        )
        self.model = DistributedModelParallel(
            collection,
            env=ShardingEnv.from_process_group(dist.group.WORLD),
            device=device,
            plan=ShardingPlan({"": own}),
            sharders=[sharder],
        )
        (weight,) = self.model.state_dict().values()
        for shard in weight.local_shards() if case.plain else ():
            first, size = shard.metadata.shard_offsets[0], shard.metadata.shard_sizes[0]
            shard.tensor.copy_(initial(table).state["value"][first : first + size])
        self.row_T, self.distinct, self.features = case.rows(), distinct, torchrec.KeyedJaggedTensor

    def step(self, batch: int) -> Tensor:
        row_T = self.row_T[batch]
        asked = torch.unique(row_T, return_inverse=True) if self.distinct else (row_T, None)
        ones = torch.ones(len(asked[0]), dtype=torch.int32)
        vector_TW: Tensor = self.model(self.features(["ngram"], asked[0], lengths=ones))["ngram"].values()
        if asked[1] is not None:
            vector_TW = F.embedding(asked[1], vector_TW)
        (vector_TW * self.case.cotangent_TW).sum().backward()  # the fused kernel changes the rows
        return vector_TW.detach()


SYSTEMS: dict[str, Callable[[Case], System]] = {
    "planned": Planned,
    "replicated": Replicated,
    "sparse": lambda case: Replicated(case, sparse=True),
    "torchrec": TorchRec,
    "torchrec_distinct": lambda case: TorchRec(case, distinct=True),
}
