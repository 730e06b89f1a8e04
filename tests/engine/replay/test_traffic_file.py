"""The file of bytes from rank to rank: against plain loops over routes, and its sums against the certificate's."""

import csv
import gzip
from collections import Counter

import numpy as np
import pytest

from foreroute.engine.certificate.counts.exact import certify
from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.counts.placement import Placement
from foreroute.engine.certificate.record import Record
from foreroute.engine.config.enums import ExchangeKind
from foreroute.engine.errors import UserError
from foreroute.engine.replay.traffic_file import write_traffic
from foreroute.engine.testing.routers import route_of
from tests.engine.replay.small_run import EXPERTS, LAYERS, MICRO, RANKS, STEPS, WIDTH, WORLD, make


def read(path):
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    header, *rows = list(csv.reader(content.decode().splitlines()))
    assert header == ["step", "source", "destination", "bytes"]
    return [tuple(map(int, row)) for row in rows]


def by_plain_loops(layout, ids, routers, step):
    """Bytes from rank to rank of a step of `tokens`: a token's row goes to each other rank of its experts, its result
    back, and gradients of both."""
    found, k, streams = Counter(), layout.k(step), layout.read(ids)
    row_bytes = WIDTH * 4
    for micro in range(MICRO):
        for rank in range(WORLD):
            batch = streams.batch(step, streams.streams_of(rank, micro, world=WORLD, accumulation=MICRO))
            first = rank - rank % RANKS
            for layer in range(LAYERS):
                router = routers[layer % len(routers)]
                for experts in route_of(router, batch.ids_BQ, batch.left_BC, k).expert_TK.tolist():
                    for home in {first + expert // (EXPERTS // RANKS) for expert in experts} - {rank}:
                        found[rank, home] += 2 * row_bytes
                        found[home, rank] += 2 * row_bytes
    return found


@pytest.mark.parametrize("name", ["traffic.csv", "traffic.csv.gz"])
def test_every_step_is_what_its_routes_say(tmp_path, name):
    layout, ids, routers = make(exchange=ExchangeKind.tokens)
    write_traffic(tmp_path / name, layout, ids, routers, range(STEPS))
    rows = read(tmp_path / name)
    assert sorted({row[0] for row in rows}) == list(range(1, STEPS + 1))
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    for step in range(STEPS):
        own = {(source, to): size for number, source, to, size in rows if number == step + 1}
        assert own == by_plain_loops(layout, ids, routers, step)


@pytest.mark.parametrize("kind", list(ExchangeKind))
def test_sums_are_the_certificates(tmp_path, kind):
    layout, ids, routers = make(exchange=kind)
    total = write_traffic(tmp_path / "t.csv", layout, ids, routers, range(STEPS))
    rows = read(tmp_path / "t.csv")
    record = Record(layout, ids, range(STEPS))
    found = certify(layout, ids, routers, also=record.add)
    certified = sum(part.bytes["gather" if part.exchange == "gather" else "tokens"].total for part in found.by_k)
    assert total == sum(row[3] for row in rows) == certified
    left = Counter()
    for step, source, _, size in rows:
        left[step, source] += size
    sent_sr = record._bytes_uyr.sum(axis=1)[record._place_s]
    assert {(s + 1, r): n for (s, r), n in np.ndenumerate(sent_sr) if n} == left


def test_too_many_ranks_are_refused(tmp_path):
    layout, ids, routers = make()
    with pytest.raises(UserError, match="world_size=8192: trace is for at most 4096 ranks"):
        write_traffic(tmp_path / "t.csv", Layout(layout.config, Placement(8192, 4, 8)), ids, routers, range(1))
