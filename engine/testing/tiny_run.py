"""A tiny training run on any number of ranks, for tests: Transformer-XL with two expert layers, through DeepSpeed.

Four streams of random text are divided over ranks and micro-batches. All results are numbered by global expert.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch import distributed as dist

from foreroute.engine.checkpoint import save_load as checkpoint
from foreroute.engine.config import (
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    MoEConfig,
    NgramTablesConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
)
from foreroute.engine.data.planned_batches import group_batch, plan_batch
from foreroute.engine.data.streams import Streams
from foreroute.engine.model.build import build_model
from foreroute.engine.model.transformer_xl import Memory
from foreroute.engine.ngram_tables.tables import NgramTables
from foreroute.engine.optim import deepspeed_engine as adapter
from foreroute.engine.optim.adam import build_optimizer
from foreroute.engine.parallel.collectives import all_reduce_sum
from foreroute.engine.parallel.cpu_group import GlooGroup
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.plan import Routing
from foreroute.engine.routing.planned.hashed import HashedRouter
from foreroute.engine.routing.plans.row_plan import NO_ROWS, TableKeys, TableRows, plan_rows
from foreroute.engine.routing.tables import Table, build_tables, table_from_state, table_state

SYMBOLS, STREAMS, SEGMENT, LAYERS, EXPERTS, K = 11, 4, 16, 2, 4, 2


def tiny_config(
    stage: int = 1,
    *,
    clip: float = 0.0,
    dropout: float = 0.0,
    model: dict[str, Any] | None = None,
    moe: dict[str, Any] | None = None,
    tables: dict[str, Any] | None = None,
    **train: Any,
) -> Config:
    """Return the run's configuration.

    Args:
        stage: of ZeRO.
        model: further options of section model.
        moe: further options of section moe.
        tables: options of section ngram_tables.
        train: further options of section train.
    """
    return Config(
        data=DataConfig(streams=STREAMS, segment=SEGMENT),
        model=ModelConfig(LAYERS, 16, heads=2, head_width=8, memory=16, dropout=dropout, init_std=0.2, **(model or {})),
        moe=MoEConfig(experts=EXPERTS, expert_width=12, ngram=2, rows=64, **(moe or {})),
        ngram_tables=NgramTablesConfig(**(tables or {})),
        schedule=ScheduleConfig(k_min=K, k_max=K),
        # With a smaller eps, rounding noise in a gradient that is nearly zero becomes a whole step.
        optim=OptimConfig(lr=0.002, clip=clip, eps=1e-6),
        train=TrainConfig(steps=10, zero_stage=stage, **train),
        eval=EvalConfig(k=[1]),
    )


class Run:
    """One rank of the run."""

    def __init__(
        self,
        mesh: Mesh,
        stage: int,
        *,
        optimizer: Callable[..., torch.optim.Optimizer] = build_optimizer,
        whole: int = 0,
        idle: bool = False,
        symbols: int = SYMBOLS,
        **options: Any,
    ) -> None:
        """Start at step 0, in the process group of run_ranks.

        Args:
            optimizer: replaces engine.optim.adam.build_optimizer.
            whole: replaces adapter.KEPT_WHOLE.
            idle: leave the second half of the experts without a token.
            symbols: of the model; the text has the first SYMBOLS of them.
            options: of tiny_config.
        """
        self.config, self.mesh = tiny_config(stage, **options), mesh
        vars(adapter).update(build_optimizer=optimizer, KEPT_WHOLE=whole)
        self.cpu_group = GlooGroup(dist.group.WORLD)  # type: ignore[arg-type]
        text = np.random.default_rng(0).integers(0, SYMBOLS, 2000).astype(np.uint8)
        self.streams = Streams(text, STREAMS, SEGMENT, self.config.context)
        tables = build_tables(self.config.moe, symbols, text, num_tables=LAYERS, seed=1, cache_dir=None)
        if idle:
            tables = [replace(t, order_rE=t.order_rE.sort().values.contiguous()) for t in tables]
        self._route_by(tables)
        self.engine = adapter.start(build_model(self.config, symbols), self.config, mesh)
        if stage == 3 and mesh.world > 1 and not whole:
            _assert_sharded(self.engine.module)
        torch.manual_seed(50 + mesh.rank)
        self.accumulation = self.config.train.accumulation
        self.memory: list[Memory | None] = [None] * self.accumulation
        self.index = 0  # number of the next step

    def step(self) -> float:
        """Run one optimizer step; return the mean loss over all ranks."""
        total = torch.zeros(())
        for micro in range(self.accumulation):
            out = self.engine.forward(*self._inputs(micro))
            self.engine.backward(out.loss)
            self.memory[micro] = out.memory
            total += out.loss.detach().float() / self.accumulation
        assert self.engine.step()
        self.index += 1
        return all_reduce_sum(total).item() / self.mesh.world

    def evaluate(self, guard: Callable[[], AbstractContextManager[Any]]) -> float:
        """Return this rank's loss on the next step's first micro-batch, by the bare model under torch.no_grad or
        similar."""
        self.engine.module.eval()
        with guard():
            loss: float = self.engine.module(*self._inputs(0)).loss.item()
        self.engine.module.train()
        return loss

    def state(self) -> dict[str, NDArray[np.float32]]:
        """Return master weights and moments, "weight/<parameter>", for each expert "weight/<parameter>@<expert>"."""
        found: dict[str, NDArray[np.float32]] = {}
        for name, values in self.engine.read_state():
            for key, value in values.items():
                full = f"{key}/{name}"
                if ".experts." in name:
                    experts = self.mesh.local_experts(EXPERTS)
                    parts = zip(experts, value, strict=True)
                    found |= {f"{full}@{expert}": part.numpy().copy() for expert, part in parts}
                else:
                    found[full] = value.numpy().copy()
        return found

    def rows(self) -> dict[tuple[int, int], NDArray[np.float32]]:
        """Return the values of this rank's rows of n-gram tables, by (table, row)."""
        return {
            (number, row): value.numpy().copy()
            for number, table in enumerate(self.tables_of_model.tables)
            for row, value in zip(table.store.owned, table.store.state["value"], strict=True)
        }

    @property
    def tables_of_model(self) -> NgramTables:
        """The n-gram tables of the model, which has some."""
        return next(module for module in self.engine.module.modules() if isinstance(module, NgramTables))

    def save(self, folder: Path) -> Path:
        """Write a checkpoint."""
        layers = zip(*[micro for micro in self.memory if micro is not None], strict=True)
        state = checkpoint.TrainingState(
            step=self.index,
            cursor=self.index,
            rng=torch.get_rng_state(),
            memory=tuple(torch.cat(layer) for layer in layers),
            stream_B=torch.tensor(self._own_streams()),
            tables=[table_state(table) for table in self.tables],
        )
        return checkpoint.save(folder, self.engine, state, facts={}, keep=2, cpu_group=self.cpu_group)

    def load(self, folder: Path) -> checkpoint.TrainingState:
        """Resume from the newest checkpoint."""
        path, warnings = checkpoint.find_newest(folder, self.cpu_group)
        assert path is not None and not warnings
        state = checkpoint.load(path, self.engine, cpu_group=self.cpu_group, streams=self._own_streams())
        assert state.memory is not None
        self._route_by([table_from_state(table) for table in state.tables])
        parts = [layer.tensor_split(self.accumulation) for layer in state.memory]
        self.memory = list(zip(*parts, strict=True))
        self.index = state.cursor
        if state.rng is not None:
            torch.set_rng_state(state.rng)
        return state

    def _route_by(self, tables: list[Table]) -> None:
        self.tables = tables
        self.routers = [router.place(self.mesh) for router in HashedRouter.of_tables(self.config.moe, tables)]

    def _streams_of(self, rank: int, micro: int) -> range:
        return self.streams.streams_of(rank, micro, world=self.mesh.world, accumulation=self.accumulation)

    def _own_streams(self) -> list[int]:
        micros = range(self.accumulation)
        return [stream for micro in micros for stream in self._streams_of(self.mesh.rank, micro)]

    def _inputs(self, micro: int) -> tuple[Tensor, Tensor, Memory | None, Routing]:
        """Return the model's inputs for the next step."""
        ranks = self.mesh.ep_ranks
        batches = [self.streams.batch(self.index, self._streams_of(r, micro)) for r in ranks]
        group = group_batch(batches, self.mesh.ep_rank)
        planned = plan_batch(
            group, K, self.routers, dropout_seed=self.index, layers=LAYERS, table_rows=self._table_rows(micro)
        )
        return planned.batch.ids_BQ, planned.batch.targets_BQ, self.memory[micro], planned.routing

    def _table_rows(self, micro: int) -> TableRows:
        keys: Sequence[TableKeys] = self.engine.module.table_keys  # type: ignore[assignment]
        if not keys:
            return NO_ROWS
        if micro == 0:
            own = range(self.accumulation)
            passes = [self.streams.batch(self.index, self._streams_of(self.mesh.rank, other)) for other in own]
            self.table_rows = plan_rows(keys, passes, self.cpu_group)
        return self.table_rows[micro]


def _assert_sharded(model: nn.Module) -> None:
    """Assert that between steps a rank holds only its shard of a dense parameter: else ZeRO-3 is not tested."""
    for name, param in model.named_parameters():
        shards = param.ds_zero_partition_world_size  # type: ignore[attr-defined]
        assert param.numel() == 0 and (shards > 1 or ".experts." in name), f"{name} is whole"
