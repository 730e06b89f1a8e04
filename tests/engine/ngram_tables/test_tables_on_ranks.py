"""A model with tables on 1, 2 and 4 ranks trains as one whose tables are ordinary parameters, in fp64.

The reference is one process: a whole table is an nn.Parameter that a hook reads by the rows' numbers, and torch's SGD
changes it. No DeepSpeed, plan or exchange is in it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist

from foreroute.engine.config import Config, NgramTablesConfig, WireFormat
from foreroute.engine.data.planned_batches import PlannedBatch, TrainingBatches, group_batch, plan_batch
from foreroute.engine.data.streams import Streams
from foreroute.engine.model.build import build_model
from foreroute.engine.model.transformer_xl import TransformerXL
from foreroute.engine.ngram_tables.row_rules import RowSGD
from foreroute.engine.ngram_tables.tables import NgramTables
from foreroute.engine.parallel.collectives import ExpertGroupComm
from foreroute.engine.parallel.cpu_group import CpuGroup, GlooGroup
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.testing.ranks import run_ranks
from foreroute.engine.testing.tiny_run import SEGMENT, STREAMS, SYMBOLS, tiny_config

STEPS, RATE = 3, 0.3
TEXT = np.random.default_rng(0).integers(0, SYMBOLS, 2000).astype(np.uint8)


@dataclass(frozen=True)
class Case:
    layers: tuple[int, ...] = ()
    width: int = 4  # of a row; 4 heads are as wide as the model
    accumulation: int = 1
    recompute: bool = False

    def config(self) -> Config:
        moe = {"router": "dense"}
        config = tiny_config(0, moe=moe, accumulation=self.accumulation, recompute=self.recompute)
        tables = NgramTablesConfig(rows=40, orders=[2, 3], heads=2, width=self.width, layers=list(self.layers))
        return replace(config, ngram_tables=tables, model=replace(config.model, memory=0))


CASES = [Case(), Case((0, 1), 3, accumulation=2, recompute=True)]


def build(case: Case) -> TransformerXL:
    return build_model(case.config(), SYMBOLS).double()


def loss_of(model: TransformerXL, planned: PlannedBatch) -> Tensor:
    """Compute the mean nats in fp64; the model's own loss is in fp32."""
    logits_BQV = model.logits(planned.batch.ids_BQ, None, planned.routing).logits_BQV
    return F.cross_entropy(logits_BQV.flatten(0, 1), planned.batch.targets_BQ.flatten())


def train(rank: int, ranks: int, case: Case, wire: WireFormat = WireFormat.model) -> Any:
    """Train this rank's part; return losses, rows by number and weights."""
    torch.set_default_dtype(torch.float64)
    config, mesh, model = case.config(), Mesh(rank, ranks), build(case)
    tables, hosts = model.ngram_tables, GlooGroup(dist.group.WORLD) if ranks > 1 else CpuGroup()
    assert tables is not None
    tables.config.wire = wire
    comm = ExpertGroupComm(None, timed=False) if ranks > 1 else None
    tables.hold(mesh, RowSGD(), comm, dtype=torch.float64)
    streams = Streams(TEXT, STREAMS, SEGMENT, config.context)
    batches = TrainingBatches(config, streams, mesh, None, CpuGroup(), tables.keys, hosts)
    losses, norms = [], []
    for step in range(STEPS):
        model.zero_grad()
        total = torch.zeros(())
        for micro in range(case.accumulation):
            planned = batches.planned(step, micro)
            loss = loss_of(model, planned) / case.accumulation
            loss.backward()
            total += loss.detach()
        tables.return_gradients()
        norms.append(tables.grad_norm().item())
        tables.update(lr=RATE, scale=1.0, keep=torch.tensor(True))
        for parameter in model.parameters():
            parameter.data -= RATE * mean(parameter.grad, ranks)
        losses.append(mean(total, ranks).item())
    rows = {
        (number, row): value
        for number, table in enumerate(tables.tables)
        for row, value in zip(table.store.owned, table.store.state["value"].numpy(), strict=True)
    }
    weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    sent = sum(tables.tables[0].comm.sent_bytes_P) if comm else 0
    return SimpleNamespace(losses=losses, norms=norms, rows=rows, weights=weights, sent=sent)


def mean(value: Tensor, ranks: int) -> Tensor:
    value = value.clone()
    if ranks > 1:
        dist.all_reduce(value)
    return value / ranks


def join(answers: list[Any]) -> Any:
    rows = {place: value for answer in answers for place, value in answer.rows.items()}
    assert sum(len(answer.rows) for answer in answers) == len(rows)
    return SimpleNamespace(**{**vars(answers[0]), "rows": rows})


def on_ranks(ranks: int, case: Case, wire: WireFormat = WireFormat.model) -> Any:
    return join(run_ranks(train, ranks, ranks, case, wire))


def reference(case: Case) -> Any:
    """The same with whole tables, read by hooks."""
    model, config = build(case), case.config()
    tables, model.ngram_tables = model.ngram_tables, None
    assert isinstance(tables, NgramTables)
    tables.hold(Mesh(), RowSGD(), dtype=torch.float64)
    whole = [nn.Parameter(table.store.state["value"].clone()) for table in tables.tables]
    read: list[Tensor] = []

    def added(number: int) -> Tensor:
        vectors = [F.embedding(read[number][..., head], whole[number]) for head in range(4)]
        flat_BQX = torch.cat(vectors, dim=-1)
        found: Tensor = tables.entries[number].project(flat_BQX)
        return found

    if not case.layers:
        model.embedding.register_forward_hook(lambda _m, _i, out: out + added(0))
    for number, layer in enumerate(case.layers):
        hook: Callable[..., Any] = lambda _m, args, number=number: (args[0] + added(number), *args[1:])  # noqa: E731
        model.blocks[layer].register_forward_pre_hook(hook)
    parameters = [*model.parameters(), *tables.parameters(), *whole]
    optimizer, streams = torch.optim.SGD(parameters, RATE), Streams(TEXT, STREAMS, SEGMENT, config.context)
    losses, norms = [], []
    for step in range(STEPS):
        batch = streams.batch(step, range(STREAMS))
        read[:] = [keys.rows_of(batch.ids_BQ, batch.left_BC) for keys in tables.keys]
        optimizer.zero_grad()
        plain = plan_batch(group_batch([batch]), 1, None)
        loss = loss_of(model, plain)
        loss.backward()
        norms.append(nn.utils.get_total_norm([table.grad for table in whole]).item())
        losses.append(loss.item())
        optimizer.step()
    rows = {
        (number, row): value.numpy() for number, table in enumerate(whole) for row, value in enumerate(table.detach())
    }
    weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    weights |= {f"ngram_tables.{name}": p.detach().numpy() for name, p in tables.named_parameters()}
    return SimpleNamespace(losses=losses, norms=norms, rows=rows, weights=weights)


def difference(got: Any, want: Any) -> float:
    """The largest difference relative to the norm of what is compared."""
    assert got.rows.keys() == want.rows.keys() and got.weights.keys() == want.weights.keys()
    parts = [(np.array(got.losses), np.array(want.losses)), (np.array(got.norms), np.array(want.norms))]
    parts += [(got.weights[name], want.weights[name]) for name in want.weights if np.linalg.norm(want.weights[name])]
    parts.append(tuple(np.stack([found.rows[place] for place in sorted(want.rows)]) for found in (got, want)))
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in parts)


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES, ids=["input", "layers"])
def test_ranks_train_like_whole_tables(case):
    torch.set_default_dtype(torch.float64)
    try:
        want, alone = reference(case), join([train(0, 1, case)])
    finally:
        torch.set_default_dtype(torch.float32)
    assert difference(alone, want) < 1e-12
    for ranks in (2, 4) if case.accumulation == 1 else (2,):
        found = on_ranks(ranks, case)
        assert difference(found, want) < 1e-12 and found.sent > 0
    # negative control: rows and gradients in bf16
    assert difference(on_ranks(2, case, WireFormat.bf16), want) > 1e-4
