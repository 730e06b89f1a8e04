"""Models whose n-gram tables enter in each way: planned rows as whole tables, and texts cut into segments."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from foreroute.engine.config import ModelConfig, NgramTablesConfig
from foreroute.engine.config.enums import NgramEntry, NgramKeys
from foreroute.engine.data.documents import document_positions
from foreroute.engine.data.planned_batches import group_batch, plan_batch
from foreroute.engine.data.streams import Streams
from foreroute.engine.errors import UserError
from foreroute.engine.model.build import build_model
from foreroute.engine.ngram_tables.public_keys import engram_keys, qwen_keys
from foreroute.engine.ngram_tables.row_rules import RowSGD
from foreroute.engine.parallel.cpu_group import CpuGroup
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.plans.row_plan import plan_rows
from foreroute.engine.testing.tiny_run import SYMBOLS, tiny_config
from foreroute.kernels.testing.cases import relative_error

LENGTH, STREAMS = 24, 2
TEXT = np.random.default_rng(3).integers(0, SYMBOLS, STREAMS * (LENGTH + 1)).astype(np.uint8)
ENTRIES = [entry.name for entry in NgramEntry]


def build(entry, *, keys="hash", recompute=False, memory=64, width=3, pre_norm=False):
    """A dense model of two layers that both read a table."""
    config = tiny_config(0, model={"pre_norm": pre_norm}, moe={"router": "dense"}, recompute=recompute)
    tables = NgramTablesConfig(rows=40, heads=2, width=width, layers=[0, 1], entry=entry, keys=keys)
    config = replace(config, ngram_tables=tables, model=replace(config.model, memory=memory))
    model = build_model(config, SYMBOLS).double()
    for name, parameter in model.named_parameters():
        if "convolution" in name:  # zero at first
            nn.init.normal_(parameter, 0.3, 0.5)
    model.ngram_tables.hold(Mesh(), RowSGD(), dtype=torch.float64)
    return model


def passes(model, segment, *, reset_starts=None):
    """The batch and the routing of each segment of the text."""
    streams = Streams(TEXT, STREAMS, segment, model.config_context)
    for number in range(LENGTH // segment):
        batch = streams.batch(number, range(STREAMS))
        if reset_starts is not None:
            first_B = np.arange(STREAMS) * streams.stream_length + number * segment
            batch = replace(batch, position_BQ=document_positions(reset_starts, first_B, segment))
        (rows,) = plan_rows(model.table_keys, [batch], CpuGroup())
        yield plan_batch(group_batch([batch]), 1, None, table_rows=rows, reset_memory=reset_starts is not None)


def logits(model, segment, **options):
    model.config_context = 2
    memory, found = None, []
    for planned in passes(model, segment, **options):
        result = model.logits(planned.batch.ids_BQ, memory, planned.routing)
        memory = result.memory
        found.append(result.logits_BQV)
    return torch.cat(found, dim=1), memory


@pytest.fixture(autouse=True)
def fp64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_cut_changes_nothing(entry, pre_norm):
    """Memory as long as the text: each place sees the same, wherever the text is cut."""
    model = build(entry, pre_norm=pre_norm)
    with torch.no_grad():
        whole, _ = logits(model, LENGTH)
        for segment in (12, 4, 1):
            assert relative_error(logits(model, segment)[0], whole) < 1e-13


@pytest.mark.parametrize("entry", ["gate", "values"])
def test_without_what_is_kept_a_cut_shows(entry):
    model = build(entry)
    with torch.no_grad():
        whole, _ = logits(model, LENGTH)
        for table in model.ngram_tables.entries:
            table.register_forward_hook(lambda _module, _args, out: out._replace(kept=torch.zeros_like(out.kept)))
        assert relative_error(logits(model, 6)[0], whole) > 1e-4


@pytest.mark.parametrize("entry", ENTRIES)
def test_documents_that_do_not_see_each_other(entry):
    """With reset memory, and keys that stop at documents, a change in one document changes no other."""
    model, starts = build(entry), np.array([5, 9, LENGTH // 2 + 1, LENGTH + 1 + 7])
    with torch.no_grad():
        before, _ = logits(model, LENGTH, reset_starts=starts)
        assert relative_error(logits(model, 6, reset_starts=starts)[0], before) < 1e-13
        old = TEXT[6]
        TEXT[6] = (old + 1) % SYMBOLS
        after, _ = logits(model, LENGTH, reset_starts=starts)
        TEXT[6] = old
    changed = (before - after).abs().amax(-1) > 1e-12
    assert changed[0, 6:9].all() and not changed[0, :6].any() and not changed[0, 9:].any() and not changed[1].any()


def whole_gradients(model, segment):
    """Losses and gradients where each table is an ordinary parameter that rows are read from by their numbers."""
    tables = model.ngram_tables
    wholes = [nn.Parameter(table.store.state["value"].clone()) for table in tables.tables]
    kept, tables.tables = tables.tables, tuple(SimpleNamespace(landed=lambda own=whole: own) for whole in wholes)
    memory, losses = None, []
    for planned in passes(model, segment):
        batch = planned.batch
        rows = tuple(keys.rows_of(batch.ids_BQ, batch.left_BC) for keys in tables.keys)
        routing = replace(planned.routing, row_plans=(), landed_BQH=rows)
        result = model.logits(batch.ids_BQ, memory, routing)
        memory = result.memory
        losses.append(F.cross_entropy(result.logits_BQV.flatten(0, 1), batch.targets_BQ.flatten()))
    gradients = torch.autograd.grad(sum(losses), [*wholes, *model.parameters()], materialize_grads=True)
    tables.tables = kept
    return torch.stack(losses), gradients


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("entry", ENTRIES)
def test_planned_rows_are_those_of_whole_tables(entry, recompute):
    """Losses and every gradient, of rows too, over segments with memory."""
    model = build(entry, recompute=recompute, memory=7, width=4 if entry == "values" else 3)
    model.config_context = 2
    want_losses, want = whole_gradients(model, 8)
    tables, memory, losses = model.ngram_tables, None, []
    found = [torch.zeros_like(gradient) for gradient in want[: len(tables.tables)]]
    for planned in passes(model, 8):
        result = model.logits(planned.batch.ids_BQ, memory, planned.routing)
        memory = result.memory
        loss = F.cross_entropy(result.logits_BQV.flatten(0, 1), planned.batch.targets_BQ.flatten())
        loss.backward()
        tables.return_gradients()
        tables.grad_norm()
        for total, plan, gradient in zip(found, planned.routing.row_plans, tables._grads, strict=True):
            total.index_add_(0, plan.touched_U, gradient)
        losses.append(loss.detach())
    assert relative_error(torch.stack(losses), want_losses.detach()) < 1e-14
    found += [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    assert max(map(relative_error, found, want)) < 1e-12
    assert all(gradient.abs().max() > 0 for gradient in want[: len(tables.tables)])


@pytest.mark.parametrize("keys", [keys.name for keys in NgramKeys])
def test_keys_of_tables(keys):
    """Each layer has a table of its own; numbers of layers and tables are those that the published formulas want."""
    model = build("add", keys=keys)
    made = model.table_keys
    assert (
        len({found.rows_of(torch.arange(11)[None], torch.zeros(1, 2).long()).numpy().tobytes() for found in made}) == 2
    )
    sizes = {"rows": 40, "heads": 2, "seed": tiny_config().train.seed}
    if keys == "engram":
        assert made[1] == engram_keys(SYMBOLS, (0, 1), 1, **{**sizes, "rows": (40, 40)})
    if keys == "qwen":
        assert made[1] == qwen_keys(SYMBOLS, 1, **sizes)
    with torch.no_grad():
        assert logits(model, 8)[0].isfinite().all()


@pytest.mark.parametrize("entry", ENTRIES[1:])
def test_the_input_takes_added_rows_alone(entry):
    with pytest.raises(UserError, match=f"ngram_tables.entry={entry}: needs ngram_tables.layers"):
        NgramTablesConfig(rows=10, entry=entry)


def test_an_entry_that_does_not_exist():
    with pytest.raises(UserError, match="entry=gated: must be one of add, gate, per_layer, values"):
        NgramTablesConfig(rows=10, entry="gated")
    with pytest.raises(UserError, match="keys=deepseek: must be one of hash, engram, qwen"):
        NgramTablesConfig(rows=10, keys="deepseek")


def test_values_are_added_to_attention():
    """In a layer without other paths: attention's output changes by the mapped weights of the added values."""
    from foreroute.engine.model.attention import RelativeAttention, SharedAttention, encode_distances

    torch.manual_seed(0)
    config = ModelConfig(width=6, heads=2, head_width=4)
    attention = RelativeAttention(config)
    context, value = torch.randn(2, 9, 6), torch.randn(2, 9, 8)
    shared = SharedAttention(encode_distances(9, 6, clamp_len=0, like=context), *torch.randn(2, 2, 4), None)
    plain, more = (attention(context[:, 4:], context, shared, given) for given in (None, value))
    with torch.no_grad():
        attention.key_value.weight[8:] = torch.zeros(8, 6)  # the context's own values
    alone = attention(context[:, 4:], context, shared, value)
    assert relative_error((more - plain).detach(), alone.detach()) < 1e-13
