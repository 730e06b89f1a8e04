"""The places that are chosen, against all places looked at one by one."""

from dataclasses import replace

import numpy as np
import pytest

from foreroute.engine.certificate.counts.exact import certify
from foreroute.engine.certificate.counts.replay import replay
from foreroute.engine.certificate.memory.peak import memory_of_rows, peak_memory_at
from foreroute.engine.certificate.memory.sizes import Rows
from foreroute.engine.config import NgramTablesConfig
from foreroute.engine.config.enums import ExchangeKind
from foreroute.engine.ngram_tables.tables import table_keys
from foreroute.engine.replay.places import Place, Places, expected_at, with_streams
from tests.engine.replay.small_run import EXPERTS, MICRO, RANKS, STEPS, SYMBOLS, WORLD, make


def all_places(layout, ids, routers):
    """Rows and memory of each place, by plain loops over ranks."""
    rows, memory = {}, {}
    for counts in replay(layout, ids, routers, range(STEPS)):
        for rank in range(WORLD):
            group, own = divmod(rank, RANKS)
            computed_ym = counts.computed_ymgP[:, :, group, own]
            received_ym = counts.sent_ymgPP[:, :, group, :, own].sum(axis=2)
            local = EXPERTS // RANKS
            expert = counts.count_ymgE[:, :, group, own * local : (own + 1) * local].max()
            rows[counts.step, rank] = int(computed_ym.sum())
            found = Rows(
                int(received_ym.max()),
                int(computed_ym.max()),
                max(int(received_ym[:, m].sum()) for m in range(MICRO)),
                max(int(computed_ym[:, m].sum()) for m in range(MICRO)),
                int(expert),
            )
            memory[counts.step, rank] = memory_of_rows(layout, SYMBOLS, counts.k, found, gpu=False).peak_bytes
    return rows, memory


@pytest.fixture(scope="module")
def material():
    layout, ids, routers = make(exchange=ExchangeKind.tokens)
    return layout, ids, routers, *all_places(layout, ids, routers)


def choose(layout, ids, routers, ranks=None):
    places = Places(layout, SYMBOLS, False, ranks)
    for counts in replay(layout, ids, routers, range(STEPS)):
        places.add(counts)
    return {why: chosen.place for chosen in places.choose() for why in chosen.why.split(", ")}


def test_the_worst_and_the_median_are_found(material):
    layout, ids, routers, rows, memory = material
    found = choose(layout, ids, routers)
    assert set(found) == {"most rows", "most bytes", "most memory", "median of rows"}
    assert rows[found["most rows"]] == max(rows.values())
    assert rows[found["median of rows"]] == sorted(rows.values())[len(rows) // 2]
    assert memory[found["most memory"]] == max(memory.values())


def test_only_named_ranks_are_chosen(material):
    layout, ids, routers, rows, _ = material
    found = choose(layout, ids, routers, [3])
    assert {place.rank for place in found.values()} == {3}
    assert rows[found["most rows"]] == max(size for (_, rank), size in rows.items() if rank == 3)


def test_a_place_has_its_own_counts_and_no_more_memory_than_the_run(material):
    layout, ids, routers, rows, memory = material
    found = expected_at(layout, ids, routers, Place(2, 5), vocab=SYMBOLS, gpu=False)
    assert found.computed_ym.sum() == rows[2, 5] and found.memory.peak_bytes == memory[2, 5]
    whole = peak_memory_at(layout, certify(layout, ids, routers), SYMBOLS, gpu=False)
    assert max(memory.values()) <= whole.peak_bytes


def test_streams_are_of_each_rank(material):
    layout = material[0]
    assert with_streams(layout, 3).streams == 3
    assert np.array_equal(with_streams(layout, layout.streams).config.data.streams, layout.config.data.streams)


def test_a_place_has_its_own_rows_of_tables():
    layout, ids, routers = make(exchange=ExchangeKind.tokens)
    layout = replace(layout, config=replace(layout.config, ngram_tables=NgramTablesConfig(rows=9, layers=[0, 1])))
    keys, rows = table_keys(layout.config.ngram_tables, SYMBOLS, 1), {}
    whole = certify(layout, ids, routers, table_keys=keys, also=lambda counts, found: rows.update({counts.step: found}))
    found = expected_at(layout, ids, routers, Place(2, 5), vocab=SYMBOLS, gpu=False, table_keys=keys)
    assert found.tables.landed_t.tolist() == rows[2].landed_tP[:, 5].tolist()
    assert found.tables.sent_t.tolist() == rows[2].sent_tP[:, 5].tolist()
    assert found.tables.table_bytes_1 == rows[2].link_bytes_PP(layout.table_row_bytes)[5].sum()
    without = expected_at(layout, ids, routers, Place(2, 5), vocab=SYMBOLS, gpu=False)
    most = peak_memory_at(layout, whole, SYMBOLS, gpu=False).peak_bytes
    assert without.memory.peak_bytes < found.memory.peak_bytes <= most
