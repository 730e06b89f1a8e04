"""The problem of benchmarks/bench_exchange.py for all systems: text, tables, routes, plans and weights, and the bytes
that follow from them.

Letters: T tokens of a rank, D width, F expert hidden width, E experts, K active experts, P ranks.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from foreroute.engine.config import CorpusConfig, MoEConfig
from foreroute.engine.config.enums import Builder, Split
from foreroute.engine.data.corpus import prepare
from foreroute.engine.data.streams import Streams
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.plan import Plan, Route
from foreroute.engine.routing.planned.hashed import HashedRouter
from foreroute.engine.routing.planned_router import GroupTokens
from foreroute.engine.routing.tables import Table, build_tables
from foreroute.kernels import ExpertWeights

COUNT_BYTES = 4  # of a row count in AutoEP's counts exchange


class Shape(NamedTuple):
    """Sizes of the model and of the batch."""

    layers: int = 4
    width: int = 256
    hidden: int = 512
    experts: int = 16
    k: int = 8
    tokens: int = 1024  # of a rank
    segment: int = 512
    ngram: int = 3
    rows: int = 65536


PUBLISHED = Shape()
QUICK = Shape(layers=2, width=32, hidden=48, tokens=64, segment=32, ngram=2, rows=512)
BUILDERS = {"spread": Builder.balanced, "packed": Builder.packed}


class Bytes(NamedTuple):
    """The bytes that one step sends, over all ranks: dispatch and combine, forward and backward, all layers."""

    left: int  # from rank to rank
    crossed: int  # of it from node to node


@dataclass(frozen=True)
class Problem:
    """A batch on a number of ranks, with the routes of every layer."""

    shape: Shape
    tables: list[Table]
    ids_PBQ: Tensor
    left_PBC: Tensor

    @property
    def ranks(self) -> int:
        """Ranks P."""
        return self.ids_PBQ.shape[0]

    @property
    def local(self) -> int:
        """Experts of a rank."""
        return self.shape.experts // self.ranks

    @cached_property
    def routes(self) -> list[list[Route]]:
        """Route of each rank's tokens in each layer."""
        pairs = zip(self.ids_PBQ.split(1), self.left_PBC.split(1), strict=True)
        tokens = [GroupTokens(*pair) for pair in pairs]
        routers = [HashedRouter(table) for table in self.tables]
        return [[router.route(own, self.shape.k) for own in tokens] for router in routers]

    def plans(self, rank: int, chunks: int = 1) -> list[Plan]:
        """Plan of each layer for one rank."""
        routers = [HashedRouter(table).place(Mesh(rank, self.ranks, self.ranks)) for table in self.tables]
        return [
            router.plan(GroupTokens(self.ids_PBQ, self.left_PBC), self.shape.k, chunks=chunks) for router in routers
        ]

    def x(self, rank: int) -> Tensor:
        """Input of a rank [T, D]; seed + 1000 gives its cotangent."""
        generator = torch.Generator().manual_seed(rank)
        return torch.randn(self.shape.tokens, self.shape.width, generator=generator)

    def weights(self, rank: int) -> list[ExpertWeights]:
        """Weights of a rank's experts in each layer."""
        shape, own = self.shape, slice(rank * self.local, (rank + 1) * self.local)
        generator = torch.Generator().manual_seed(0)
        matrix = shape.experts, shape.hidden, shape.width

        def draw(*size: int, scale: float) -> Tensor:
            return (scale * torch.randn(*size, generator=generator))[own].clone()

        return [
            ExpertWeights(
                draw(*matrix, scale=shape.width**-0.5),
                draw(*matrix[:2], scale=0.1),
                draw(*matrix, scale=shape.hidden**-0.5),
                draw(shape.experts, shape.width, scale=0.1),
            )
            for _ in range(shape.layers)
        ]


def make_problem(shape: Shape, tables: str, ranks: int, nodes: int = 2) -> Problem:
    """Build (or load) tables of the Python standard library's text and take a batch out of its middle.

    Packed tables have the experts of one node as a block.
    """
    builder = BUILDERS[tables]
    pack = shape.experts // nodes if builder is Builder.packed else None
    moe = MoEConfig(experts=shape.experts, ngram=shape.ngram, rows=shape.rows, builder=builder, pack=pack)
    config = CorpusConfig()
    corpus = prepare(config)
    ids = corpus.split(Split.train)
    built = build_tables(
        moe, corpus.vocab.size, ids, num_tables=shape.layers, seed=1111, cache_dir=Path(config.cache_dir) / "tables"
    )
    streams = ranks * shape.tokens // shape.segment
    cut = Streams(ids, streams, shape.segment, shape.ngram - 1)
    batch = cut.batch(cut.segments_per_epoch // 2, range(streams))
    return Problem(
        shape, built, batch.ids_BQ.view(ranks, -1, shape.segment), batch.left_BC.view(ranks, -1, shape.ngram - 1)
    )


def planned_bytes(problem: Problem, per_node: int) -> Bytes:
    """Return our bytes, from the plans: a row travels once each way in forward and in backward."""
    left = crossed = 0
    for rank in range(problem.ranks):
        for plan in problem.plans(rank):
            for other, rows in enumerate(plan.send_splits):
                left += rows * (other != rank)
                crossed += rows * (other // per_node != rank // per_node)
    trip = 4 * problem.shape.width * 4  # dispatch, combine and both backward; fp32
    return Bytes(left * trip, crossed * trip)


def autoep_bytes(problem: Problem, per_node: int) -> Bytes:
    """Count the bytes of AutoEP's dispatch: one row for each choice, and once in a layer the counts."""
    trip, total = 4 * problem.shape.width * 4, [0, 0]
    for rank, far in _pairs(problem.ranks, per_node):
        for layer in problem.routes:
            homes_TK = layer[rank].expert_TK // problem.local
            for other, crosses in far:
                sent = int((homes_TK == other).sum()) * trip + problem.local * COUNT_BYTES
                total[0] += sent
                total[1] += sent * crosses
    return Bytes(*total)


def moe_bytes(problem: Problem, per_node: int) -> Bytes:
    """Count the bytes of DeepSpeed's MoE layer: every expert of every rank gets as many rows as the busiest
    anywhere."""
    trip, total = 4 * problem.shape.width * 4, [0, 0]
    for _, far in _pairs(problem.ranks, per_node):
        for layer in problem.routes:
            sent = capacity(layer, problem.shape.experts) * problem.local * trip
            total[0] += sent * len(far)
            total[1] += sent * sum(crosses for _, crosses in far)
    return Bytes(*total)


def capacity(layer: list[Route], experts: int) -> int:
    """Return the rows of the busiest expert of any rank."""
    counts = [torch.bincount(route.expert_TK.flatten(), minlength=experts).max() for route in layer]
    return int(max(counts))


def _pairs(ranks: int, per_node: int) -> list[tuple[int, list[tuple[int, bool]]]]:
    """Return each rank with its peers, and whether they are on another node."""
    return [
        (rank, [(q, q // per_node != rank // per_node) for q in range(ranks) if q != rank]) for rank in range(ranks)
    ]
