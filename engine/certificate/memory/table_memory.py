"""Memory of n-gram tables on one rank: rows with their optimizer's state, rows of a step, and plans.

Rows and their state are exact, table by table. The rows that a step reads and changes are the exact maxima over ranks
and steps (engine/certificate/counts/table_rows.py); all tables are taken to have theirs at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from foreroute.engine.certificate.counts.table_rows import OfTable
from foreroute.engine.certificate.memory.sizes import Sizes
from foreroute.engine.certificate.memory.state import Phase
from foreroute.engine.certificate.memory.terms import Term, term
from foreroute.engine.config.enums import NgramEntry, RowMoments, RowPlace, RowUpdates

_GATED = 8  # tensors of the model's width that a gate and its convolution keep


@dataclass(frozen=True, slots=True)
class TableMemory:
    """The tables of a run on one rank."""

    sizes: Sizes
    tables: Sequence[OfTable]

    def held(self) -> list[Term]:
        """List what is held all the time."""
        config, found = self.sizes.config.ngram_tables, list[Term]()
        host = config.place is RowPlace.host
        for number, table in enumerate(self.tables):
            name, local = f"n-gram table {number}", ceil(table.rows / self.sizes.placement.world_size)
            found.append(term(name, f"{local} rows x {config.width} width x 4 bytes", host=host))
            found += [term(f"{name}, Adam's state", f"{local} rows x {each}", host=host) for each in self._state]
            if host:  # rows of the steps that are prepared or under way
                steps = self.sizes.config.data.prefetch + 1
                kept = [f"{config.width} width x 4 bytes", *self._state]
                found += [term(f"{name}, fetched", f"{steps} steps x {table.touched.max} rows x {x}") for x in kept]
        return found + self._plans()

    def moment(self, phase: Phase) -> list[Term]:
        """List the rows of a step that are held at a moment, and what the entries keep for backward."""
        width, accumulated = self.sizes.config.ngram_tables.width, self.sizes.config.train.accumulation > 1
        found, landed = list[Term](), phase is not Phase.step
        gradients = phase is Phase.backward_end or (phase is Phase.backward and accumulated)
        for table in self.tables:
            rows = f"{table.landed.max} rows x {width} width x 4 bytes"
            found += [term("rows of n-gram tables", rows)] if landed else []
            found += [term("gradients of rows", rows)] if gradients else []
            if not landed:
                words = f"2 copies x {table.touched.max} rows x {width} width x 4 bytes"
                found.append(term("gradients of rows", words))
        return found

    def entries(self) -> list[Term]:
        """List what the entries of rows keep for backward."""
        s, config = self.sizes, self.sizes.config.ngram_tables
        found = list[Term]()
        for table in self.tables:
            read = table.heads * config.width
            positions = s.streams * s.keys if config.entry is NgramEntry.values else s.tokens
            target = s.inner if config.entry is NgramEntry.values else s.config.model.width
            if read != target or config.entry in (NgramEntry.gate, NgramEntry.per_layer):
                found.append(term("entries of rows", f"{positions} tokens x {read} numbers x {s.number} bytes"))
            if config.entry in (NgramEntry.gate, NgramEntry.per_layer):
                words = f"{_GATED} tensors x {s.tokens} tokens x {target} width x {s.number} bytes"
                found.append(term("entries of rows", words))
            if config.entry is NgramEntry.values:
                found.append(term("entries of rows", f"{positions} positions x {target} numbers x {s.number} bytes"))
        dense = s.config.dense_table
        if dense is not None and dense.heads_read * dense.width != s.config.model.width:
            words = f"{s.tokens} tokens x {dense.heads_read} heads x {dense.width} width x {s.number} bytes"
            found.append(term("entries of rows", words))
        return found

    @property
    def _state(self) -> list[str]:
        """List the state of a row by its formulas."""
        config = self.sizes.config.ngram_tables
        element = config.moments is RowMoments.element
        found = [f"{2 if element else 1} moments x {config.width} width x 4 bytes"]
        found += [] if element else ["1 moments x 4 bytes"]
        return [*found, "1 counts x 4 bytes"] if config.updates is RowUpdates.count else found

    def _plans(self) -> list[Term]:
        """List the plans of this step and of those planned ahead: where each token reads, and what is sent."""
        s, train = self.sizes, self.sizes.config.train
        found, dense = list[Term](), s.config.dense_table
        heads = [table.heads for table in self.tables] + ([] if dense is None else [dense.heads_read])
        passes = (s.config.data.prefetch + 1) * train.accumulation
        found += [term("plans", f"{passes} plans x {s.tokens} tokens x {each} heads x 8 bytes") for each in heads]
        for table in self.tables:
            words = f"{s.config.data.prefetch + 1} plans x {table.landed.max + table.touched.max} rows x 16 bytes"
            found.append(term("plans", words))
        return found
