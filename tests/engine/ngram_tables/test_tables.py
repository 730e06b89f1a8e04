"""The rows of a model's tables go where the model goes."""

import pytest
import torch

from foreroute.engine.config import NgramTablesConfig
from foreroute.engine.ngram_tables.row_rules import RowAdam
from foreroute.engine.ngram_tables.tables import NgramTables
from foreroute.engine.parallel.mesh import Mesh


@pytest.mark.parametrize("place", ["device", "host"])
def test_rows_move_with_the_model(place: str) -> None:
    config = NgramTablesConfig(rows=20, width=4, place=place)  # type: ignore[arg-type]
    tables = NgramTables(config, width=8, inner=8, vocab_size=11, seed=1, init_std=0.1)
    tables.hold(Mesh(), RowAdam())
    before = tables.tables[0].store.state["value"].clone()
    tables.half()
    assert torch.equal(tables.tables[0].store.state["value"], before)  # of type fp32
    tables.to("meta")
    kept = {value.device.type for value in tables.tables[0].store.state.values()}
    assert kept == {"cpu" if place == "host" else "meta"}
