"""Rows of n-gram tables in a checkpoint, by their global numbers: for any number of ranks, written and read in parts.

    ngram_rows/<table>/<kind>/<first row of the part:012d>/<rank:05d>

A part is a range of global rows. Each rank writes those of a part that it holds: of P ranks rank r has the rows g with
g % P = r, in order. Kinds are the values and the state of the rule that trains them (engine/ngram_tables/row_rules.py).
The manifest describes each table (describe_rows).

Letters: W width of a row.
"""

from collections.abc import Iterator, Sequence
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from foreroute.engine.checkpoint.parameters import Reader
from foreroute.engine.errors import require
from foreroute.engine.ngram_tables.row_rules import VALUE, RowSGD
from foreroute.engine.ngram_tables.store import RowStore
from foreroute.engine.ngram_tables.tables import NgramTables
from foreroute.engine.parallel.mesh import Mesh

TABLES = "ngram_tables"
"""Of a manifest: what describes each table; absent in those that were written before there were tables."""
UPDATES = "row_updates"
"""Of a manifest: the updates that the rows had, of the whole run."""
_MOST_NUMBERS = 1 << 24  # of all ranks in a part: 64 MiB of fp32


def describe_tables(module: nn.Module) -> dict[str, Any]:
    """Return what the manifest says of a model's tables."""
    updates = [int(tables.updates) for tables in _tables_in(module)]
    return {TABLES: describe_rows(row_stores(module)), UPDATES: max(updates, default=0)}


def load_tables(reader: Reader, module: nn.Module) -> None:
    """Overwrite values and state of this rank's rows of a model in training.

    Raises:
        UserError: the tables differ from those here; names the first difference.
    """
    load_rows(reader, row_stores(module))
    for tables in _tables_in(module):
        tables.updates = reader.manifest[UPDATES]


def load_table_values(reader: Reader, module: nn.Module) -> None:
    """Make all rows of the tables of a model that is not in training; raises as load_tables."""
    for tables in _tables_in(module):
        tables.hold(Mesh(), RowSGD())
    load_values(reader, row_stores(module))


def row_stores(module: nn.Module) -> list[RowStore]:
    """Return this rank's rows of all tables of a model, as the last step left them."""
    for tables in _tables_in(module):
        tables.settle()
    return [table.store for tables in _tables_in(module) for table in tables.tables]


def describe_rows(stores: Sequence[RowStore]) -> list[dict[str, Any]]:
    """Return what the manifest says of each table: rows, width, the state of a row by kind, and the rows of a part."""
    return [
        {
            "rows": store.rows,
            "width": store.width,
            "state": {kind: list(kept.shape[1:]) for kind, kept in store.state.items() if kind != VALUE},
            "part": max(1, _MOST_NUMBERS // store.width),
        }
        for store in stores
    ]


def own_rows(stores: Sequence[RowStore]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that this rank writes: views of the stores, on their device."""
    for table, (store, entry) in enumerate(zip(stores, describe_rows(stores), strict=True)):
        for first in range(0, store.rows, entry["part"]):
            local = _local(store.owned, first, entry["part"])
            for kind, kept in store.state.items():
                yield _key(table, kind, first, store.owned.start), kept[local]


def load_rows(reader: Reader, stores: Sequence[RowStore]) -> None:
    """Overwrite values and state of this rank's rows, part by part; the checkpoint may be of other ranks.

    Raises:
        UserError: the tables differ from those here; names the first difference.
    """
    _check(reader, stores, ("rows", "width", "state"))
    for table, store in enumerate(stores):
        for kind in store.state:
            _load_kind(reader, store, table, kind)


def load_values(reader: Reader, stores: Sequence[RowStore]) -> None:
    """Overwrite the values of this rank's rows alone, for evaluation; raises as load_rows."""
    _check(reader, stores, ("rows", "width"))
    for table, store in enumerate(stores):
        _load_kind(reader, store, table, VALUE)


def _check(reader: Reader, stores: Sequence[RowStore], names: Sequence[str]) -> None:
    """Compare the tables in a checkpoint with those here, by these facts of each."""
    stored, here = reader.manifest.get(TABLES, []), describe_rows(stores)
    require(
        len(stored) == len(here),
        f"{reader.path} does not fit this model: it has {len(stored)} n-gram tables, the model {len(here)}",
    )
    for table, (there, own) in enumerate(zip(stored, here, strict=True)):
        for name in names:
            require(
                there[name] == own[name],
                f"{reader.path} does not fit this model: {name} of n-gram table {table} is {there[name]} in the"
                f" checkpoint, {own[name]} here",
            )


def _load_kind(reader: Reader, store: RowStore, table: int, kind: str) -> None:
    part = reader.manifest[TABLES][table]["part"]
    for first in range(0, store.rows, part):
        _load_part(reader, store, table, kind, first, part)


def _load_part(reader: Reader, store: RowStore, table: int, kind: str, first: int, part: int) -> None:
    own, ranks = store.owned, reader.manifest["ranks"]
    local = _local(own, first, part)
    if local.start == local.stop:
        return
    kept = store.state[kind]
    rows = torch.empty(min(part, store.rows - first), *kept.shape[1:], dtype=kept.dtype)
    for rank in range(ranks):
        if (rank - own.start) % gcd(ranks, own.step) == 0:  # otherwise it had none of the rows that are here
            rows[(rank - first) % ranks :: ranks] = reader.get(_key(table, kind, first, rank))
    kept[local] = rows[(own.start - first) % own.step :: own.step].to(kept.device)


def _local(owned: range, first: int, part: int) -> slice:
    """Return which of a rank's rows are in the part that begins at global row `first`.

    Example: rank 1 of 3 has the rows 1, 4, 7, 10; of the part 4 .. 7 its rows 1 and 2, a slice from 1 to 3.
    """
    return slice(*(len(range(owned.start, min(end, owned.stop), owned.step)) for end in (first, first + part)))


def _key(table: int, kind: str, first: int, rank: int) -> str:
    return f"ngram_rows/{table}/{kind}/{first:012d}/{rank:05d}"


def _tables_in(module: nn.Module) -> list[NgramTables]:
    return [part for part in module.modules() if isinstance(part, NgramTables)]
