"""Rows of n-gram tables and their bytes, counted ahead, against loops over the ranks' own ids."""

from dataclasses import replace

import numpy as np
import pytest

from foreroute.engine.certificate.counts.exact import certify
from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.counts.placement import Placement
from foreroute.engine.certificate.counts.table_rows import RowCounter
from foreroute.engine.config import Config, NgramTablesConfig, WireFormat
from foreroute.engine.ngram_tables.tables import table_keys
from foreroute.engine.routing.planned.hashed import HashedRouter
from foreroute.engine.routing.tables import build_tables
from foreroute.engine.testing.tiny_run import LAYERS, SYMBOLS, tiny_config

RANKS, STEPS, ROW_BYTES = 4, 3, 3 * 2
TEXT = np.random.default_rng(1).integers(0, SYMBOLS, 700).astype(np.uint8)
TABLES = NgramTablesConfig(rows=40, orders=[1, 2], heads=2, width=3, layers=[0, 1], wire=WireFormat.bf16)


def config() -> Config:
    found = replace(tiny_config(accumulation=1), ngram_tables=TABLES)
    return replace(found, train=replace(found.train, steps=STEPS))


KEYS = table_keys(TABLES, SYMBOLS, config().train.seed)


def read(step: int) -> list[list[set[int]]]:
    """The distinct rows of each table and rank."""
    streams = Layout(config(), Placement(RANKS)).read(TEXT)
    found = []
    for keys in KEYS:
        batches = [
            streams.batch(step, streams.streams_of(rank, 0, world=RANKS, accumulation=1)) for rank in range(RANKS)
        ]
        found.append([set(keys.rows_of(batch.ids_BQ, batch.left_BC).flatten().tolist()) for batch in batches])
    return found


def test_rows_and_bytes_equal_loops():
    layout = Layout(config(), Placement(RANKS, 1, 2))
    counter = RowCounter(layout, KEYS, layout.read(TEXT))
    for step in range(STEPS):
        counts, rows = counter.count(step), read(step)
        of_owner = [[[{r for r in own if r % RANKS == q} for q in range(RANKS)] for own in table] for table in rows]
        assert counts.read_tPP.tolist() == [[[len(part) for part in own] for own in table] for table in of_owner]
        touched = [[len(set().union(*(own[q] for own in table))) for q in range(RANKS)] for table in of_owner]
        assert counts.touched_tP.tolist() == touched
        assert counts.landed_tP.tolist() == [[len(own) for own in table] for table in rows]
        want = np.zeros((RANKS, RANKS), int)  # from, to
        for table in of_owner:
            for reader in range(RANKS):
                for owner in range(RANKS):
                    if reader != owner:
                        number = len(table[reader][owner])
                        want[owner, reader] += number * ROW_BYTES  # rows
                        want[reader, owner] += number * ROW_BYTES + 4 * (number + 1)  # gradients, and row numbers
        assert counts.link_bytes_PP(ROW_BYTES).tolist() == want.tolist()


def test_the_certificate_sums_them_up():
    layout = Layout(config(), Placement(RANKS, 1, 2))
    tables = build_tables(layout.config.moe, SYMBOLS, TEXT, num_tables=LAYERS, seed=1, cache_dir=None)
    kept = []
    found = certify(
        layout,
        TEXT,
        HashedRouter.of_tables(layout.config.moe, tables),
        table_keys=KEYS,
        also=lambda _, rows: kept.append(rows),
    ).tables
    assert found is not None and len(kept) == STEPS
    bytes_sPP = np.stack([rows.link_bytes_PP(ROW_BYTES) for rows in kept])
    far_PP = np.arange(RANKS)[:, None] // 2 != np.arange(RANKS) // 2
    assert found.row_bytes == ROW_BYTES and found.total == bytes_sPP.sum()
    assert found.rank.max == bytes_sPP.sum(axis=2).max() and found.rank.mean == bytes_sPP.sum(axis=2).mean()
    assert found.link.max == bytes_sPP.max() and found.link.mean == pytest.approx(bytes_sPP.sum() / STEPS / 12)
    assert found.between.max == (bytes_sPP * far_PP).sum(axis=2).max()
    for table, of_table in enumerate(found.tables):
        landed_sP = np.stack([rows.landed_tP[table] for rows in kept])
        assert of_table.place == f"layer {table}" and of_table.rows == 160 and of_table.heads == 4
        assert of_table.landed.max == landed_sP.max() and of_table.landed.mean == landed_sP.mean()
    ids = [4 * (rows.read_tPP + 1) * ~np.eye(RANKS, dtype=bool) for rows in kept]
    assert found.ids.max == max(part.sum(axis=(0, 2)).max() for part in ids)


def test_one_rank_sends_nothing():
    layout = Layout(config(), Placement())
    counts = RowCounter(layout, KEYS, layout.read(TEXT)).count(0)
    assert counts.link_bytes_PP(ROW_BYTES).tolist() == [[0]] and counts.landed_tP.min() > 0
