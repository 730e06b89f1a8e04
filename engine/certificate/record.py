"""A certificate on the disk: certificate.json, and certificate.safetensors with each step's rows and bytes by rank.

`Record` collects while the steps are counted (exact.certify's `also`), and writes. The run that is held to the
certificate reads it by `read` (engine/certificate/check.py). Steps that repeat are stored once. The JSON seals both
files by checksums.

Letters: t n-gram tables, s counted steps, u distinct ones, y layers, m micro-batches of a step, r ranks of the run, g
expert groups and P ranks of one.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.counts.placement import Placement
from foreroute.engine.certificate.counts.replay import StepCounts, first_steps
from foreroute.engine.certificate.counts.table_rows import TableCounts
from foreroute.engine.certificate.counts.traffic import hops, leaving
from foreroute.engine.data.tokens.vocab import Ids
from foreroute.engine.errors import require
from foreroute.engine.routing.planned_router import PlannedRouter
from foreroute.engine.routing.plans.row_plan import TableKeys, some_rows
from foreroute.engine.sealed_files import read_sealed, sealed, sha256_of

FORMAT = 5  # raise it when something else is written, or other options are compared
JSON, ARRAYS = "certificate.json", "certificate.safetensors"
Counts = NDArray[np.integer[Any]]


class RankCounts(NamedTuple):
    """Rows and bytes of a step by rank, by the exchange that the run uses."""

    received_yrm: Counts
    computed_yrm: Counts
    bytes_yr: Counts  # that leave the rank


def rank_counts(layout: Layout, counts: StepCounts) -> RankCounts:
    """Return a step's rows and bytes by rank of the run."""
    world, gather = layout.placement.world_size, layout.exchange(counts.k) == "gather"
    received_ymgP = counts.received_ymgP
    if gather:
        received_ymgP = np.full_like(received_ymgP, layout.placement.expert_ranks * layout.tokens)
    hops_ymgPP = hops(counts, "gather" if gather else "tokens", layout.placement, layout.tokens)
    rows_ygP = leaving(hops_ymgPP, layout.layer_trips).sum(axis=1)
    received_yrm, computed_yrm = (
        np.moveaxis(rows_ymgP, 1, 3).reshape(-1, world, rows_ymgP.shape[1])
        for rows_ymgP in (received_ymgP, counts.computed_ymgP)
    )
    return RankCounts(received_yrm, computed_yrm, rows_ygP.reshape(-1, world) * layout.row_bytes)


class Record:
    """Collects the rows and bytes of each step, by the exchange that the run uses at that step's k.

    Args:
        ids: the training split.
        steps: those that are counted (Layout.counted_steps).
    """

    def __init__(self, layout: Layout, ids: Ids, steps: range) -> None:
        self._layout = layout
        config, placement = layout.config, layout.placement
        first_s = first_steps(layout, ids, steps)
        self._first_u, place_s = np.unique(first_s, return_inverse=True)
        self._place_s = place_s.astype(np.min_scalar_type(self._first_u.size))
        group_tokens = placement.expert_ranks * layout.tokens
        micro, trips = config.train.accumulation, max(map(sum, layout.layer_trips), default=0)
        shape = self._first_u.size, layout.expert_layers, placement.world_size

        def zeros(largest: int, *more: int) -> Counts:
            return np.zeros((*shape, *more), np.min_scalar_type(largest))

        self._received_uyrm = zeros(group_tokens, micro)
        self._computed_uyrm = zeros(group_tokens * layout.local_experts, micro)
        self._bytes_uyr = zeros(micro * trips * group_tokens * layout.row_bytes)
        tables = len(config.ngram_tables.places)
        shape_utr = self._first_u.size, tables, placement.world_size
        self._landed_utr, self._sent_utr = np.zeros(shape_utr, np.uint32), np.zeros(shape_utr, np.uint32)
        self._table_bytes_ur = np.zeros((self._first_u.size, placement.world_size), np.uint64)

    def add(self, counts: StepCounts, rows: TableCounts | None = None) -> None:
        """Take in a step, with the rows of its n-gram tables."""
        place = int(np.searchsorted(self._first_u, counts.step))
        found = rank_counts(self._layout, counts)
        self._received_uyrm[place], self._computed_uyrm[place] = found.received_yrm, found.computed_yrm
        self._bytes_uyr[place] = found.bytes_yr
        if rows is not None:
            self._landed_utr[place], self._sent_utr[place] = rows.landed_tP, rows.sent_tP
            self._table_bytes_ur[place] = rows.link_bytes_PP(self._layout.table_row_bytes).sum(axis=1)

    def write(self, folder: Path, facts: dict[str, Any]) -> int:
        """Write both files and return the bytes of the arrays.

        Args:
            facts: the JSON's content: "options", "corpus_sha256", "tables_sha256" and the certificate
                (exact.Certificate).
        """
        arrays = {
            "place_s": self._place_s,
            "received_uyrm": self._received_uyrm,
            "computed_uyrm": self._computed_uyrm,
            "bytes_uyr": self._bytes_uyr,
            "landed_utr": self._landed_utr,
            "sent_utr": self._sent_utr,
            "table_bytes_ur": self._table_bytes_ur,
        }
        return write(folder, facts, arrays)


def write(folder: Path, facts: dict[str, Any], arrays: dict[str, Counts]) -> int:
    """Write and seal both files; return the bytes of the arrays."""
    folder.mkdir(parents=True, exist_ok=True)
    content = save(arrays)
    (folder / ARRAYS).write_bytes(content)
    whole = {**facts, "format": FORMAT, "arrays_sha256": hashlib.sha256(content).hexdigest()}
    (folder / JSON).write_text(json.dumps(sealed(whole), indent=1) + "\n", encoding="ascii")
    return len(content)


@dataclass(frozen=True, slots=True)
class Written:
    """A certificate that was read."""

    path: Path  # of the JSON
    facts: dict[str, Any]

    @property
    def scope(self) -> str:
        """Which of the run's steps were counted, in words."""
        steps, sample = self.facts["steps"], self.facts["sample"]
        last = self.facts["options"]["train"]["steps"]
        span = f"all {last:,} steps" if steps == last else f"the first {steps:,} of {last:,} steps"
        return span if sample == 1 else f"one in {sample} of {span}"

    @property
    def placement(self) -> Placement:
        """The ranks that it was made for."""
        return Placement(**self.facts["placement"])

    def of_rank(self, rank: int) -> "Expected":
        """Read the rows and bytes of one rank."""
        with safe_open(self.path.with_name(ARRAYS), "numpy") as file:

            def of_layers(name: str) -> Counts:
                whole = not self.facts["layers"]  # nothing: safetensors refuses a slice of it
                of_rank: Counts = (file.get_tensor(name) if whole else file.get_slice(name))[:, :, rank]
                return of_rank

            return Expected(
                self.facts["sample"],
                file.get_tensor("place_s"),
                of_layers("received_uyrm"),
                of_layers("computed_uyrm"),
                of_layers("bytes_uyr"),
                file.get_tensor("landed_utr")[:, :, rank],
                file.get_tensor("sent_utr")[:, :, rank],
                file.get_slice("table_bytes_ur")[:, rank],
            )


@dataclass(frozen=True, slots=True)
class Expected:
    """Rows and bytes of each step of one rank."""

    sample: int  # every so manieth step is known
    place_s: Counts  # of each known step, its number among the distinct ones
    received_uym: Counts  # rows that arrive at the rank's experts in a forward pass, the rank's own included
    computed_uym: Counts  # expert rows of a forward pass
    bytes_uy: Counts  # that leave the rank in a step: forward, backward, and what recomputation repeats
    landed_ut: Counts  # rows of n-gram tables that land on the rank in a step, its own included
    sent_ut: Counts  # rows of n-gram tables that the rank sends in a step, to itself included
    table_bytes_u: Counts  # that leave the rank in a step for n-gram tables

    def find(self, step: int) -> int | None:
        """Return a step's number among the distinct ones; None if it is not known."""
        known, between = divmod(step, self.sample)
        return None if between or known >= len(self.place_s) else int(self.place_s[known])


def read(path: Path) -> Written:
    """Read a certificate, given its folder or its JSON.

    Raises:
        UserError: there is none, or it is damaged or of another format version.
    """
    path = path / JSON if path.is_dir() else path
    require(path.is_file(), f"certificate={path}: no such file; launch.certify writes one")
    facts = read_sealed(path, "certificate", FORMAT)
    arrays = path.with_name(ARRAYS)
    require(arrays.is_file(), f"{arrays}: no such file; it belongs to {path}")
    require(sha256_of(arrays) == facts["arrays_sha256"], f"{arrays}: damaged or not of {path}: its sha256 differs")
    return Written(path, facts)


def tables_sha256(routers: Iterable[PlannedRouter], table_keys: Iterable[TableKeys] = ()) -> str:
    """Digest of what decides which experts a token uses, and which shared rows of n-gram tables; weights are not in
    it."""
    digest = hashlib.sha256()
    arrays = [array for router in routers for array in router.identity(weights=False)]
    shared = (keys for keys in table_keys if not keys.whole)
    for array in (*arrays, *map(some_rows, shared)):
        digest.update(json.dumps([*array.shape]).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
