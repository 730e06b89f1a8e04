"""Documents that are packed into streams do not see each other: not by attention, memory, or keys; on one rank and two.

One document of a text is changed, and the logits of all others are compared bit for bit.
"""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from foreroute.engine.data.documents import ends_at
from foreroute.engine.data.planned_batches import TrainingBatches, group_batch, plan_batch
from foreroute.engine.data.streams import Batch, Streams
from foreroute.engine.model.build import build_model
from foreroute.engine.model.transformer_xl import first_keys
from foreroute.engine.moe.exchange import build_exchange
from foreroute.engine.moe.layer import MoELayer
from foreroute.engine.parallel.collectives import ExpertGroupComm
from foreroute.engine.parallel.cpu_group import CpuGroup
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing import ngram_rows
from foreroute.engine.routing.plans.row_plan import plan_rows
from foreroute.engine.routing.tables import build_tables
from foreroute.engine.testing.ranks import run_ranks
from foreroute.engine.testing.routers import hashed_of
from foreroute.engine.testing.tiny_run import LAYERS, SEGMENT, STREAMS, SYMBOLS, tiny_config

END, STEPS = 0, 4


def make_text():
    """Documents of 2 to 23 ids, each with its end."""
    draw = np.random.default_rng(2)
    return np.concatenate([[*draw.integers(1, SYMBOLS, draw.integers(1, 23)), END] for _ in range(30)]).astype(np.uint8)


TEXT = make_text()
STARTS = np.array([0, *ends_at(TEXT, END)])
CHANGED = 2  # of stream 0, across its first two segments


def changed_text():
    """Another id for each of document CHANGED but its end."""
    text, own = TEXT.copy(), slice(STARTS[CHANGED], STARTS[CHANGED + 1] - 1)
    text[own] = 1 + text[own] % (SYMBOLS - 1)
    return text


def make_config(router="hashed", *, reset_memory=True, ranks=1):
    config = tiny_config()
    return replace(
        config,
        data=replace(config.data, reset_memory=reset_memory),
        model=replace(config.model, ngram=3, ngram_rows=50),
        moe=replace(config.moe, router=router, ngram=3, rows=200),
        parallel=replace(config.parallel, expert_ranks=ranks),
    )


def logits_of(config, text, mesh, *, exchange=None):
    """Logits of this rank's streams, [streams, steps * Q, V], segment by segment with memory."""
    model = build_model(config, SYMBOLS).eval()
    for module in model.modules():
        if exchange is not None and isinstance(module, MoELayer):
            module.keep_experts(mesh.local_experts(config.moe.experts))
            module.connect(exchange)
    tables = build_tables(config.moe, SYMBOLS, TEXT, num_tables=LAYERS, seed=1, cache_dir=None)
    routers = hashed_of(tables, mesh) if config.moe.router == "hashed" else None
    streams = Streams(text, STREAMS, SEGMENT, config.context, document_starts=STARTS)
    batches = TrainingBatches(config, streams, mesh, routers, table_keys=model.table_keys)
    memory, found = None, []
    with torch.no_grad():
        for step in range(STEPS):
            planned = batches.planned(step, 0)
            out = model.logits(planned.batch.ids_BQ, memory, planned.routing)
            memory = out.memory
            found.append(out.logits_BQV)
    return torch.cat(found, dim=1)


def compare(rank, ranks, router, options):
    """Whether each place of this rank's streams is of the changed document, and whether its logits are the same."""
    mesh, config = Mesh(rank, ranks, ranks), make_config(router, ranks=ranks, **options)
    exchange = build_exchange(ExpertGroupComm(None), config.parallel) if ranks > 1 else None
    one, other = (logits_of(config, text, mesh, exchange=exchange) for text in (TEXT, changed_text()))
    size = STREAMS // ranks
    place = np.arange(rank * size, (rank + 1) * size)[:, None] * (len(TEXT) // STREAMS) + np.arange(STEPS * SEGMENT)
    document = np.searchsorted(STARTS, place, side="right") - 1
    return torch.from_numpy(document == CHANGED), (one == other).all(-1)


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("router", ["hashed", "dense", "frozen"])
def test_a_changed_document_changes_no_bit_of_another(router, ranks):
    for rank, (own, same) in enumerate(run_ranks(compare, ranks, ranks, router, {})):
        assert same[~own].all()
        assert rank > 0 or (own.any() and not same[own].any())


def test_control_attention_and_memory():
    """Without data.reset_memory keys alone stop: all that comes after the document in its stream is another number."""
    own, same = compare(0, 1, "dense", {"reset_memory": False})
    after = own.int().cummax(1).values.bool() & ~own
    assert after.any() and not same[after].any() and same[~after & ~own].all()


def test_control_keys(monkeypatch):
    """If keys do not stop the next document has other ones at its first ids, at the input and in routers."""
    keys = ngram_rows.ngram_keys
    monkeypatch.setattr(ngram_rows, "ngram_keys", lambda ids, vocab, ngram, marks=None: keys(ids, vocab, ngram))
    for router in ("hashed", "dense"):
        own, same = compare(0, 1, router, {})
        assert not same[~own].all()


def test_each_document_is_as_if_it_were_alone():
    """From its first id, with no memory, nothing left of it: the logits of hashed routing, to rounding."""
    config = make_config()
    packed = logits_of(config, TEXT, Mesh()).flatten(0, 1)
    place = (np.arange(STREAMS)[:, None] * (len(TEXT) // STREAMS) + np.arange(STEPS * SEGMENT)).ravel()
    model = build_model(config, SYMBOLS).eval()
    tables = build_tables(config.moe, SYMBOLS, TEXT, num_tables=LAYERS, seed=1, cache_dir=None)
    compared = 0
    for start, end in pairwise(STARTS):
        (inside,) = np.nonzero(place == start)
        if end - start > config.model.memory + 1 or not inside.size or not np.isin(end - 1, place):
            continue
        ids = torch.from_numpy(TEXT[None, start:end].astype(np.int64))
        batch = Batch(
            ids, ids, torch.zeros(1, config.context, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 0, True
        )
        (rows,) = plan_rows(model.table_keys, [batch], CpuGroup())
        planned = plan_batch(group_batch([batch]), 2, hashed_of(tables, Mesh()), table_rows=rows)
        with torch.no_grad():
            alone = model.logits(ids, None, planned.routing).logits_BQV[0]
        torch.testing.assert_close(packed[inside[0] : inside[0] + len(alone)], alone, rtol=1e-4, atol=1e-5)
        compared += 1
    assert compared > 5


def test_first_keys_example():
    assert first_keys(torch.tensor([[1, 2, 0, 1]], dtype=torch.int32), 2).tolist() == [[1, 1, 4, 4]]
    assert first_keys(torch.tensor([[2**31 - 1]], dtype=torch.int32), 3).tolist() == [[0]]


def test_recomputation_of_activations_hides_the_same_keys():
    config = make_config("dense")
    streams = Streams(TEXT, STREAMS, SEGMENT, config.context, document_starts=STARTS)
    model = build_model(config, SYMBOLS)
    batches = TrainingBatches(config, streams, Mesh(), None, table_keys=model.table_keys)
    grads = []
    for model.recompute in (False, True):
        memory = None
        for step in range(2):
            planned = batches.planned(step, 0)
            out = model(planned.batch.ids_BQ, planned.batch.targets_BQ, memory, planned.routing)
            memory = out.memory
        grads.append(torch.autograd.grad(out.loss, list(model.parameters())))
    assert all(map(torch.equal, *grads))
