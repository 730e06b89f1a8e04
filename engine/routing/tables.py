"""Tables: the fixed map of a hashed router from the n-gram that ends at a token to an ordering of all experts.

`build_tables` makes the tables of a run from its configuration and (unless its builder is `random`) its training ids,
and keeps them in the cache folder. The first k experts of a row are active, so sets are nested in k. A table is part of
the model: `table_state` turns it into tensors for a checkpoint. All randomness is stateless
(engine/routing/hashing.py).

A row is an ordering of blocks of `pack` neighbouring experts, and inside each block an ordering of its experts; without
packing all experts are one block. So the first k experts lie in ceil(k / pack) blocks.

A rule (engine/routing/row_counts.py) may give each row a number of experts of its own, k on average. They are made
first, since they do not depend on which expert is where; the orders are then balanced at these numbers.

Letters: E experts, G blocks of experts, B streams, Q segment length, C ids left of a segment (at least ngram - 1), r
table rows, t tables, s rows seen in training.
"""

import hashlib
import json
import logging
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foreroute.engine.config import Builder, MoEConfig, RouteWeights
from foreroute.engine.errors import require
from foreroute.engine.routing.hashing import Purpose, hash64, normal
from foreroute.engine.routing.loops.orders import greedy
from foreroute.engine.routing.ngram_rows import KeyRows, ngram_keys
from foreroute.engine.routing.planned_router import RouterInputs
from foreroute.engine.routing.row_counts import CountRule, first_k
from foreroute.engine.routing.row_sets import column_dtype
from foreroute.engine.sealed_files import replacing

_FORMAT = 1  # part of the cache key; raise it when the same inputs would give another table
_NUMBERS = ("ngram", "vocab_size", "seed", "index", "pack")
_ARRAYS = ("order_rE", "logits_rE", "first_rE")
# Symbols counted, and entries of tables drawn at a time, to bound memory; these fit in a cache.
_CHUNK, _DRAWN = 1 << 22, 1 << 18
# n-grams that may have a counter each (256 MiB); beyond it each occurrence finds its row
_COUNTERS = 1 << 25

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Table:
    """Orderings of the experts by row, and which row an n-gram falls into."""

    order_rE: Tensor  # uint8, or int16 above 256 experts: each row a permutation of all experts, or of merged ones
    logits_rE: Tensor | None  # fp32, descending in a row; None for other than table weights
    ngram: int
    vocab_size: int
    seed: int
    index: int  # number of the table within the run
    builder: Builder
    pack: int  # experts of a block: a row uses up one block before it touches the next; E without packing
    first_rE: Tensor | None = None  # int16: the first k at which a row uses each of its choices; None: 1 .. E

    def identity(self, *more: int, weights: bool = True) -> list[NDArray[Any]]:
        """Return all that choices from it depend on, as PlannedRouter.identity; `more` are the router's own numbers."""
        numbers = np.array([self.ngram, self.vocab_size, self.seed, self.index, *more])
        tensors = self.order_rE, self.first_rE, self.logits_rE if weights else None
        return [numbers, *(tensor.numpy() for tensor in tensors if tensor is not None)]

    def count_r(self, k: int) -> Tensor | None:
        """Return how many experts each row uses at k, int32; None: all use k."""
        return None if self.first_rE is None else (self.first_rE <= k).sum(dim=1, dtype=torch.int32)

    @property
    def key_rows(self) -> KeyRows:
        """The map from n-grams to its rows."""
        rows = self.order_rE.shape[0]
        return KeyRows(self.ngram, self.vocab_size, rows, self.seed, self.index)

    def rows_of(self, ids_BQ: Tensor, left_BC: Tensor, new_document_BX: Tensor | None = None) -> Tensor:
        """Return the int64 row [B, Q] of each id, given the true ids left of each segment; as KeyRows.of."""
        return self.key_rows.of(ids_BQ, left_BC, new_document_BX)


def build_tables(
    moe: MoEConfig,
    vocab_size: int,
    train_ids: NDArray[np.integer[Any]],
    *,
    num_tables: int,
    seed: int,
    cache_dir: Path | None,
    documents: NDArray[np.int64] | None = None,
    counts: CountRule | None = None,
) -> list[Table]:
    """Build tables 0 .. num_tables - 1 of a run, or load them from the cache.

    A table depends on its number but not on num_tables. Builder `random` reads the training ids for `counts` alone.

    Args:
        train_ids: the training split as one stream; ids before its first count as 0.
        cache_dir: folder of .npz files, safe to delete; None for no cache.
        documents: ascending, where in the stream documents begin, at which keys stop; None: one document.
        counts: how many experts each row uses; None: k.

    Raises:
        UserError: the tables would be too large.
    """
    moe.check_table()
    text = _Text(train_ids, vocab_size, moe.ngram, documents)
    if cache_dir is None:
        arrays = _build(moe, text, num_tables, seed, counts)
    else:
        key = _cache_key(moe, text, num_tables, seed, counts)
        path = cache_dir / f"tables-{key}.npz"
        arrays = _load(path) or _build(moe, text, num_tables, seed, counts)
        if not path.exists():
            try:
                _save(path, arrays)
            except OSError as error:
                _log.warning("the tables are not cached: %s", error)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    order_trE, logits_trE, first_trE = (tensors.get(name) for name in ("order", "logits", "first"))
    assert order_trE is not None
    return [
        Table(
            order_rE=order_trE[index],
            logits_rE=None if logits_trE is None else logits_trE[index],
            ngram=moe.ngram,
            vocab_size=vocab_size,
            seed=seed,
            index=index,
            builder=moe.builder,
            pack=moe.pack or moe.columns,
            first_rE=None if first_trE is None else first_trE[index],
        )
        for index in range(num_tables)
    ]


def tables_of(moe: MoEConfig, inputs: RouterInputs, *, number: int, counts: CountRule | None = None) -> list[Table]:
    """Build so many tables from what planned routers are made from, or load them from the cache; as build_tables.

    Raises:
        UserError: they are made from a text, and there is none.
    """
    text = inputs.ids
    if text is None:
        of_text = moe.builder is not Builder.random or counts is not None
        require(not of_text, f"moe.router={moe.router}: its tables are made from a text; there is none")
        text = np.zeros(0, np.int64)
    return build_tables(
        moe,
        inputs.vocab_size,
        text,
        num_tables=number,
        seed=inputs.seed,
        cache_dir=inputs.cache_dir,
        documents=inputs.documents,
        counts=counts,
    )


def row_uses(tables: Sequence[Table], inputs: RouterInputs) -> NDArray[np.int64]:
    """Return how often the training text uses each row of each of a run's tables [t, r], reading it once.

    Raises:
        UserError: there is no text.
    """
    require(inputs.ids is not None, "the router counts how often a text uses each row; there is no text")
    assert inputs.ids is not None
    text = _Text(inputs.ids, inputs.vocab_size, tables[0].ngram, inputs.documents)
    return text.row_frequency([table.key_rows for table in tables]).astype(np.int64)


def row_frequency(
    table: Table, ids: NDArray[np.integer[Any]], documents: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """Return how often a text uses each row [r]; ids before its first count as 0, documents as for build_tables."""
    text = _Text(ids, table.vocab_size, table.ngram, documents)
    return text.row_frequency([table.key_rows]).reshape(-1)


def table_state(table: Table) -> dict[str, Tensor]:
    """Turn a table into tensors for a checkpoint; table_from_state is the inverse."""
    state = {name: torch.tensor(getattr(table, name)) for name in _NUMBERS}
    state["builder"] = torch.tensor(list(table.builder.name.encode()), dtype=torch.uint8)
    for name in _ARRAYS:
        if (array := getattr(table, name)) is not None:
            state[name] = array.contiguous()
    return state


def table_from_state(state: dict[str, Tensor]) -> Table:
    """Rebuild a table from table_state's tensors; a state without `pack` is of a table without packing."""
    state = {"pack": torch.tensor(state["order_rE"].shape[1]), **state}
    return Table(
        order_rE=state["order_rE"],
        logits_rE=state.get("logits_rE"),
        builder=Builder[bytes(state["builder"].tolist()).decode()],
        first_rE=state.get("first_rE"),
        **{name: int(state[name]) for name in _NUMBERS},
    )


@dataclass(frozen=True, slots=True)
class _Text:
    """A stream of ids, read a chunk at a time: it may be longer than memory."""

    ids: NDArray[np.integer[Any]]
    vocab_size: int
    ngram: int
    documents: NDArray[np.int64] | None  # where they begin

    def row_frequency(self, keys_t: list[KeyRows]) -> NDArray[np.float64]:
        """Return how often each table's rows are used [t, r]."""
        rows = keys_t[0].rows
        freq_tr = np.zeros((len(keys_t), rows))
        for key, counts in self._counted_keys():
            for freq_r, keys in zip(freq_tr, keys_t, strict=True):
                freq_r += np.bincount(keys.of_keys(key), counts, rows)
        return freq_tr

    def digest(self) -> str:
        """Return a digest of all that the tables depend on."""
        digest = hashlib.sha256()
        for start in range(0, self.ids.size, _CHUNK):
            digest.update(np.ascontiguousarray(self.ids[start : start + _CHUNK]).data)
        if self.documents is not None:
            digest.update(b"documents" + np.ascontiguousarray(self.documents).tobytes())
        return digest.hexdigest()

    def _counted_keys(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64] | None]]:
        """Yield keys and how often they occur (None: once each); a key may come again."""
        if self.vocab_size**self.ngram > _COUNTERS:
            yield from ((key, None) for key in self._keys())
            return
        counts = np.zeros(self.vocab_size**self.ngram, np.int64)
        for key in self._keys():
            counts += np.bincount(key, minlength=counts.size)
        keys = np.flatnonzero(counts)
        yield keys, counts[keys]

    def _keys(self) -> Iterator[NDArray[np.int64]]:
        """Yield the key of the n-gram that ends at each id, a chunk at a time."""
        left = self.ngram - 1
        for start in range(0, self.ids.size, _CHUNK):
            part = self.ids[max(start - left, 0) : start + _CHUNK]
            part = np.concatenate([np.zeros(max(left - start, 0), part.dtype), part])
            begins = None
            if self.documents is not None:
                begins = np.zeros((1, part.size), bool)
                first, last = np.searchsorted(self.documents, [start - left, start - left + part.size])
                begins[0, self.documents[first:last] - (start - left)] = True
            yield ngram_keys(part[None], self.vocab_size, self.ngram, begins)[0]


def _build(
    moe: MoEConfig, text: _Text, num_tables: int, seed: int, counts: CountRule | None
) -> dict[str, NDArray[Any]]:
    """Return order uint8 or int16 [t, r, E]; for table weights logits fp32 and with `counts` first int16, both
    [t, r, E]."""
    order_trE = np.empty((num_tables, moe.rows, moe.columns), column_dtype(moe.columns))
    pack, freq_tr = moe.pack or moe.columns, np.zeros((num_tables, moe.rows))
    if moe.builder is not Builder.random or counts is not None:
        tables = range(num_tables)
        freq_tr = text.row_frequency([KeyRows(moe.ngram, text.vocab_size, moe.rows, seed, index) for index in tables])
    found = {"order": order_trE}
    if moe.weights is RouteWeights.table:
        found["logits"] = np.empty(order_trE.shape, np.float32)
    if counts is not None:
        found["first"] = np.empty(order_trE.shape, np.int16)

    def build(index: int) -> None:
        use_r, first_rE = freq_tr[index].astype(np.int64), np.empty((0, 0), np.int16)
        if "logits" in found or counts is not None:
            logits_rE = _draw_logits(moe, seed, index)
        if "logits" in found:
            found["logits"][index] = logits_rE
        if counts is not None:
            found["first"][index] = first_rE = first_k(counts, logits_rE, use_r, seed=seed, index=index)
        if moe.builder is Builder.random:
            use_r = np.zeros_like(use_r)
        _draw_orders(order_trE[index], np.flatnonzero(use_r == 0), pack, seed, index)
        _balance(order_trE[index], use_r, first_rE, pack, seed, index)

    with ThreadPoolExecutor(_threads(num_tables)) as pool:
        list(pool.map(build, range(num_tables)))
    return found


def _threads(num_tables: int) -> int:
    """Return how many tables are built at a time: as many as PyTorch has threads, which launchers share out."""
    return max(1, min(num_tables, torch.get_num_threads()))


def _chunks(row_r: NDArray[np.int64], experts: int) -> list[NDArray[np.int64]]:
    return np.array_split(row_r, -(-row_r.size * experts // _DRAWN)) if row_r.size else []


def _draw_orders(order_rE: NDArray[Any], row_r: NDArray[np.int64], pack: int, seed: int, index: int) -> None:
    """Overwrite the given rows with random orderings of the blocks, and of the experts inside each block."""
    experts = order_rE.shape[1]
    blocks = experts // pack
    for row_s in _chunks(row_r, experts):
        draw_sE = hash64(Purpose.order, seed, index, row_s[:, None], np.arange(experts))
        inner_sGp = draw_sE.reshape(-1, blocks, pack).argsort(axis=2)
        inner_sGp += pack * np.arange(blocks)[:, None]
        block_sG = hash64(Purpose.block_order, seed, index, row_s[:, None], np.arange(blocks)).argsort(axis=1)
        order_sGp = np.take_along_axis(inner_sGp, block_sG[:, :, None], axis=1)
        order_rE[row_s] = order_sGp.reshape(-1, experts)


def _draw_logits(moe: MoEConfig, seed: int, index: int) -> NDArray[np.float32]:
    """Return normal logits [r, E], descending in each row."""
    logits_rE = np.empty((moe.rows, moe.columns), np.float32)
    for row_s in _chunks(np.arange(moe.rows), moe.columns):
        draw_sE = moe.spread * normal(hash64(Purpose.logit, seed, index, row_s[:, None], np.arange(moe.columns)))
        logits_rE[row_s] = -np.sort(-draw_sE, axis=1)
    return logits_rE


def _balance(
    order_rE: NDArray[Any], use_r: NDArray[np.int64], first_rE: NDArray[np.int16], pack: int, seed: int, index: int
) -> None:
    """Overwrite the orderings of rows seen in training so that the load is even at every k.

    One greedy rule orders the blocks of each row and then, block by block, the experts inside. For each row in
    descending frequency (ties by row number) and each choice c in turn: of the things (blocks, or experts of the block
    in turn) that the row has not used, those whose load_c is within the row's frequency of the lightest are candidates;
    a hash of (seed, table, row, c) takes one; then load_c grows by the frequency for every thing among the row's first
    c + 1 choices.

    Where first_rE is not empty, load_c is that at the first k at which the row has choice c, and the row's first c + 1
    choices weigh on the loads of all k at which they are its set.
    """
    rows, experts = order_rE.shape
    row_s = np.argsort(-use_r, kind="stable")[: np.count_nonzero(use_r)]
    use_s = use_r[row_s]
    block_rG = np.zeros((rows, experts // pack), order_rE.dtype)
    if (blocks := block_rG.shape[1]) > 1:
        state, whole_r1 = np.uint64(hash64(Purpose.block_tie, seed, index)), np.zeros((rows, 1), order_rE.dtype)
        first_rG = np.ascontiguousarray(first_rE[:, ::pack])
        greedy(row_s, use_s, state, whole_r1, block_rG, first_rG, experts if first_rG.size else blocks)
    greedy(row_s, use_s, np.uint64(hash64(Purpose.tie, seed, index)), block_rG, order_rE, first_rE, experts)


def _cache_key(moe: MoEConfig, text: _Text, num_tables: int, seed: int, counts: CountRule | None) -> str:
    digest = "" if moe.builder is Builder.random and counts is None else text.digest()
    names = ("columns", "ngram", "rows", "spread", "pack")
    inputs = [_FORMAT, moe.builder.name, moe.weights.name, *(getattr(moe, name) for name in names)]
    inputs += [text.vocab_size, num_tables, seed, digest, *([] if counts is None else [counts.key])]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:32]


def _load(path: Path) -> dict[str, NDArray[Any]] | None:
    """Read cached arrays; None if there are none or the file is damaged (it is then removed, with a warning)."""
    if not path.exists():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        _log.warning("%s is damaged (%s): building the tables again", path, error)
        path.unlink(missing_ok=True)
        return None


def _save(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """Write the cache file at once, so that no process sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as new, new.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
