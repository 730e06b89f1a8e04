"""The tables of one model: parameters, arithmetic, generation symbol by symbol, and options that do not fit."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from foreroute.engine.config import Config, ModelConfig, NgramTablesConfig
from foreroute.engine.data.planned_batches import group_batch, plan_batch
from foreroute.engine.data.streams import Batch
from foreroute.engine.errors import UserError
from foreroute.engine.model.build import build_model
from foreroute.engine.model.flops import Arithmetic
from foreroute.engine.model.transformer_xl import TransformerXL
from foreroute.engine.parallel.cpu_group import CpuGroup
from foreroute.engine.routing.plan import Routing
from foreroute.engine.routing.plans.row_plan import plan_rows
from foreroute.engine.testing.tiny_run import SYMBOLS, tiny_config

B, Q = 2, 6
TABLES = NgramTablesConfig(rows=50, orders=[1, 3], heads=2, width=3, layers=[0, 1])


def config(tables: NgramTablesConfig = TABLES) -> Config:
    return replace(tiny_config(moe={"router": "dense"}), ngram_tables=tables)


def routing_of(model: TransformerXL, ids_BQ: torch.Tensor, left_BC: torch.Tensor) -> Routing:
    batch = Batch(ids_BQ, ids_BQ, left_BC, torch.arange(len(ids_BQ)), 0, fresh=False)
    rows = plan_rows(model.table_keys, [batch], CpuGroup())[0]
    return plan_batch(group_batch([batch]), 1, None, table_rows=rows).routing


def ids() -> torch.Tensor:
    return torch.randint(0, SYMBOLS, (B, Q), generator=torch.Generator().manual_seed(4))


def test_parameters_and_arithmetic():
    model, without = build_model(config(), SYMBOLS), build_model(config(NgramTablesConfig()), SYMBOLS)
    width = config().model.width
    projections = 2 * (4 * 3) * width
    assert model.num_parameters - without.num_parameters == 2 * (4 * 50) * 3 + projections
    assert model.ngram_tables.num_unread == 2 * (4 * 50 - 4) * 3
    counted = []
    for each in (model, without):
        routing = routing_of(each, ids(), torch.zeros(B, 2, dtype=torch.int64))
        with FlopCounterMode(display=False) as flops:
            each(ids(), ids(), None, routing).loss.backward()
        counted.append(flops.get_total_flops())
    per_symbol = [
        Arithmetic(found, SYMBOLS, 0).flops_per_symbol(1) for found in (config(), config(NgramTablesConfig()))
    ]
    assert counted[0] - counted[1] == 3 * B * Q * (per_symbol[0] - per_symbol[1]) == 3 * B * Q * 2 * projections


def test_rows_as_wide_as_the_model_are_not_projected():
    tables = NgramTablesConfig(rows=50, orders=[2], heads=4, width=4)
    model = build_model(config(tables), SYMBOLS)
    assert list(model.ngram_tables.parameters()) == [] and config().model.width == 16
    plain = Arithmetic(config(NgramTablesConfig()), SYMBOLS, 0).flops_per_symbol(1)
    assert Arithmetic(config(tables), SYMBOLS, 0).flops_per_symbol(1) == plain


@torch.inference_mode()
def test_one_symbol_at_a_time_is_as_all_at_once():
    model = build_model(config(), SYMBOLS).eval()
    id_Q = ids()[:1]
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.int64), id_Q], dim=1)
    together = model.logits(id_Q, None, routing_of(model, id_Q, padded[:, :2])).logits_BQV
    memory, parts = None, []
    for place in range(Q):
        routing = routing_of(model, id_Q[:, place : place + 1], padded[:, place : place + 2])
        logits_BQV, memory, *_ = model.logits(id_Q[:, place : place + 1], memory, routing)
        parts.append(logits_BQV)
    assert torch.allclose(torch.cat(parts, dim=1), together, atol=1e-5)
    # negative control: other ids left of a symbol
    other = model.logits(id_Q, None, routing_of(model, id_Q, padded[:, :2] + 1)).logits_BQV
    assert not torch.allclose(other, together, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"orders": [3, 2]}, "ngram_tables.orders=[3, 2]: must be ascending numbers in 1 .. 4"),
        ({"orders": []}, "ngram_tables.orders=[]: must be"),
        ({"orders": [2, 5]}, "ngram_tables.orders=[2, 5]: must be"),
        ({"heads": 0}, "ngram_tables.heads=0: must be at least 1"),
        ({"layers": [1, 1]}, "ngram_tables.layers=[1, 1]: must be ascending numbers of layers from 0"),
        ({"layers": [-1]}, "ngram_tables.layers=[-1]: must be"),
        ({"rows": 1 << 30}, "ngram_tables.rows=1073741824 with 2 orders of 4 heads: must be below 2147483648"),
        ({"lr_factor": 0.0}, "ngram_tables.lr_factor=0.0: must be above 0"),
        ({"wire": "fp8"}, "ngram_tables.wire=fp8: must be one of model, fp32, bf16"),
    ],
)
def test_options_that_do_not_fit_are_named(options, line):
    with pytest.raises(UserError) as refused:
        NgramTablesConfig(**options)
    assert line in str(refused.value) and "\n" not in str(refused.value)


def test_layers_that_the_model_lacks_are_refused():
    with pytest.raises(UserError, match=r"ngram_tables.layers=\[1, 4\]: must be below model.layers=4"):
        Config(model=ModelConfig(layers=4), ngram_tables=NgramTablesConfig(rows=5, layers=[1, 4]))


def test_the_context_reaches_the_longest_n_gram():
    assert config().context == 2 and config(NgramTablesConfig(rows=5, orders=[4])).context == 3
    assert config(NgramTablesConfig(orders=[4])).context == 0  # no table
