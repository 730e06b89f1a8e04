"""Holds a run to its certificate: each step's counts on this rank against those from before the run.

`fits`, `fits_text` and `fits_tables` refuse a certificate of another run before the first step. `Check` watches the
expert layers where the rows are: rows received are the rows of the tensors that arrive, expert rows those of the index
tensors that the kernels are given, bytes what the collectives of a layer counted (engine/parallel/collectives.py). They
are compared on the host, after the backward passes and before the weights change. Each rank compares its own: there is
no collective, and nothing is read back from a device.

Letters: y layers, m micro-batches of a step.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.record import Written, tables_sha256
from foreroute.engine.config import to_plain
from foreroute.engine.config.option import option_names
from foreroute.engine.errors import RunFailed, require
from foreroute.engine.moe.exchange import Exchange, Local, Moving, Transfer
from foreroute.engine.moe.layer import MoELayer
from foreroute.engine.ngram_tables.tables import NgramTables
from foreroute.engine.routing.planned_router import PlannedRouter
from foreroute.engine.routing.plans.row_plan import TableKeys

# Options that decide which rows go to which rank and when.
_ROUTES = option_names(
    corpus=("tokens", "vocab_size", "weights", "stretch", "document_end"),
    data=("streams", "segment", "start"),
    model=("layers",),
    moe=(
        *("router", "options", "experts", "constant_experts", "copy_experts", "null_experts", "ngram", "rows"),
        *("builder", "pack", "share_table", "keys", "layers", "strata", "strata_experts", "by_layer"),
    ),
    schedule=("growth", "k_min", "k_max", "steps"),
    train=("steps", "accumulation"),
    parallel=("expert_ranks",),
    ngram_tables=("rows", "orders", "heads", "width", "layers", "keys", "optimizer", "wire"),
)
# Options that may decide what a row weighs, how often it travels and by which exchange.
_ROW = ("model.width", "train.precision", "parallel.wire")
_TRIPS = ("train.recompute", "parallel.chunks", "model.pre_norm", "model.dropout", "moe.shared_width")
_EXCHANGE = ("parallel.exchange", "parallel.link_gb_per_s", "parallel.message_us", "parallel.memory_gb_per_s", *_ROW)


def fits(written: Written, layout: Layout, world_size: int) -> None:
    """Refuse a certificate that was made for other ranks, or with an option that changes rows or bytes.

    Args:
        layout: the run on the certificate's ranks.
        world_size: ranks of the run.

    Raises:
        UserError: names the first such option, its value and the certificate's.
    """
    facts, path = written.facts, written.path
    placement, options = layout.placement, to_plain(layout.config)
    require(
        placement.world_size == world_size,
        f"ranks: {world_size}; {path} is the certificate of a run on {placement.world_size}",
    )
    difference = _difference(written, options, _ROUTES)
    if difference is None and placement.expert_ranks > 1:
        certified_exchange = {part["k"]: part["exchange"] for part in facts["by_k"]}
        exchange = {k: layout.exchange(k) for k in certified_exchange}
        for names, certified, now in (
            (_ROW, facts["row_bytes"], layout.row_bytes),
            (_TRIPS, facts["trips"], list(layout.trips)),
            (_EXCHANGE, certified_exchange, exchange),
        ):
            if difference is None and certified != now:
                difference = _difference(written, options, names) or "written by another version"
    require(difference is None, f"{path} is the certificate of another run: {difference}")


def fits_text(written: Written, sha256: str) -> None:
    """Refuse a certificate of another text.

    Raises:
        UserError: the text's sha256 is not the certificate's.
    """
    certified = written.facts["corpus_sha256"]
    require(
        certified == sha256,
        f"the corpus has changed since {written.path} was written: its sha256 was {certified[:16]}..., "
        f"now it is {sha256[:16]}...",
    )


def fits_tables(
    written: Written, seed: int, routers: Sequence[PlannedRouter], table_keys: Sequence[TableKeys] = ()
) -> None:
    """Refuse a certificate of other tables, such as those of another seed.

    Raises:
        UserError: the tables' digest is not the certificate's.
    """
    certified, now = written.facts["tables_sha256"], tables_sha256(routers, table_keys)
    difference = _difference(written, {"train": {"seed": seed}}, ["train.seed"])
    require(
        certified == now,
        f"{written.path} is the certificate of a run with other tables: {difference or 'train.seed is the same'}; "
        f"their sha256 was {certified[:16]}..., now it is {now[:16]}...",
    )


def _difference(written: Written, now: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Return the first option that is not as it was certified, in words."""
    certified = written.facts["options"]
    for name in names:
        section, option = name.split(".")
        value, before = now[section][option], certified[section].get(option)  # None in older certificates
        if value != before:
            return f"{name}={value}, certified {before}"
    return None


@dataclass(slots=True)
class _Done:
    """Counts of a layer since it is watched."""

    received_rows: int = 0
    computed_rows: int = 0
    sent_bytes: int = 0


class _Watched(Exchange):
    """An exchange that counts the rows that arrive at a layer's experts, and the bytes that the layer sends."""

    def __init__(self, exchange: Exchange, done: _Done) -> None:
        super().__init__(exchange.comm, exchange.parallel, exchange.backend)
        self._done = done

    def to_experts(self, x_tD: Tensor, chunk: Transfer) -> Moving:
        """Send a chunk's rows from tokens to experts."""
        with self._sending():
            moving = super().to_experts(x_tD, chunk)

        def finish(rows: Tensor) -> Tensor:
            arrived_RD = moving.finish(rows)
            self._done.received_rows += arrived_RD.shape[0]
            return arrived_RD

        return Moving(moving.collective, finish)

    def to_tokens(self, partial_RD: Tensor, chunk: Transfer) -> Moving:
        """Send a chunk's rows from experts to tokens."""
        with self._sending():
            return super().to_tokens(partial_RD, chunk)

    @contextmanager
    def _sending(self) -> Iterator[None]:
        before = self.comm.sent_bytes
        yield
        self._done.sent_bytes += self.comm.sent_bytes - before


def _watch(layer: MoELayer) -> _Done:
    """Count from now on the rows and bytes of a layer."""
    done = _Done()
    alone = isinstance(layer.exchange, Local)
    if isinstance(layer.exchange, Exchange):
        layer.connect(_Watched(layer.exchange, done))

    def before_experts(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        rows_RD, plan = inputs[:2]
        done.computed_rows += sum(chunk.rows.num_rows for chunk in plan.chunks)
        if alone:  # nothing arrives by an exchange
            done.received_rows += rows_RD.shape[0]

    layer.experts.register_forward_pre_hook(before_experts)
    return done


class StepRows(NamedTuple):
    """Rows and bytes of one step of one rank."""

    received_ym: NDArray[np.int64]  # rows that arrived at the rank's experts in the forward passes
    computed_ym: NDArray[np.int64]  # expert rows of the forward passes
    bytes_y: NDArray[np.int64]  # that left the rank
    landed_t: NDArray[np.int64]  # rows of each n-gram table that arrived
    sent_t: NDArray[np.int64]  # rows of each n-gram table that left
    table_bytes_1: NDArray[np.int64]  # of all n-gram tables, that left the rank


class RowCounts:
    """Counts the rows and bytes of one rank's steps, where the rows are.

    Args:
        model: as it trains, its experts shared out over the ranks.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = [module for module in model.modules() if isinstance(module, MoELayer)]
        self._done_y = [_watch(layer) for layer in layers]
        self._sent_before_y: list[int] = []
        self._rows_my: list[list[tuple[int, int]]] = []  # of this step: received and computed
        self._tables = [module for module in model.modules() if isinstance(module, NgramTables)]
        self._tables_before = self._tables_now()

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Count the forward pass of the step's next micro-batch, which runs inside."""
        if not self._rows_my:
            self._sent_before_y = [done.sent_bytes for done in self._done_y]
            self._tables_before = self._tables_now()
        before_y = [(done.received_rows, done.computed_rows) for done in self._done_y]
        yield
        self._rows_my.append(
            [
                (done.received_rows - received, done.computed_rows - computed)
                for done, (received, computed) in zip(self._done_y, before_y, strict=True)
            ]
        )

    def take(self) -> StepRows:
        """Return the counts since the step's first forward pass; call it after the last backward pass."""
        shape = len(self._rows_my), len(self._done_y), 2
        rows_2ym = np.array(self._rows_my, np.int64).reshape(shape).transpose(2, 1, 0)
        sent_y = np.array([done.sent_bytes for done in self._done_y], np.int64)
        bytes_y = sent_y - np.array(self._sent_before_y, np.int64)
        tables = [now - before for now, before in zip(self._tables_now(), self._tables_before, strict=True)]
        self._rows_my = []
        return StepRows(rows_2ym[0], rows_2ym[1], bytes_y, *tables)

    def _tables_now(self) -> list[NDArray[np.int64]]:
        """Return the rows that landed, the rows that were sent, and the bytes that were, since the start."""
        tables = [table for module in self._tables for table in module.tables]
        landed_t, sent_t = ([getattr(table, name) for table in tables] for name in ("landed_rows", "sent_rows"))
        total = sum(module.sent_bytes for module in self._tables)
        return [np.array(values, np.int64) for values in (landed_t, sent_t, [total])]


class Check:
    """Compares the steps of one rank with its certificate.

    Args:
        model: as for RowCounts.
    """

    def __init__(self, written: Written, model: nn.Module, rank: int) -> None:
        self.written = written
        self._rank, self._expected = rank, written.of_rank(rank)
        self._counts = RowCounts(model)
        self.steps = 0  # compared so far

    def forward(self) -> AbstractContextManager[None]:
        """Count the forward pass of the step's next micro-batch, which runs inside."""
        return self._counts.forward()

    def compare(self, step: int) -> None:
        """Compare the counts since the step's first forward pass.

        Raises:
            RunFailed: on this rank; names the first difference, by layer and micro-batch.
        """
        rows = self._counts.take()
        found = self._expected.find(step)
        if found is None:
            return
        self.steps += 1
        self._compare_tables(step, found, rows)
        for what, certified, seen in (
            ("rows received", self._expected.received_uym[found], rows.received_ym),
            ("expert rows computed", self._expected.computed_uym[found], rows.computed_ym),
            ("bytes sent", self._expected.bytes_uy[found], rows.bytes_y),
        ):
            if np.array_equal(certified, seen):
                continue
            place = tuple(np.argwhere(certified != seen)[0])
            micro = f", micro-batch {place[1]}" if len(place) > 1 else ""
            raise RunFailed(
                f"rank {self._rank} differs from its certificate at step {step + 1}, layer {place[0]}{micro}: "
                f"{what} {seen[place]}, certified {certified[place]}"
            )

    def _compare_tables(self, step: int, found: int, rows: StepRows) -> None:
        expected = self._expected
        certified = expected.landed_ut[found], expected.sent_ut[found], expected.table_bytes_u[found : found + 1]
        seen = rows.landed_t, rows.sent_t, rows.table_bytes_1
        for what, wanted, got in zip(("rows landed", "rows sent", "bytes sent"), certified, seen, strict=True):
            for number in np.flatnonzero(wanted != got):
                where = "n-gram tables" if what == "bytes sent" else f"n-gram table {number}"
                raise RunFailed(
                    f"rank {self._rank} differs from its certificate at step {step + 1}, {where}: "
                    f"{what} {got[number]}, certified {wanted[number]}"
                )
