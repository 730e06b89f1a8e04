"""Tables: the fixed map of a hashed router from the n-gram that ends at a token to an ordering of all experts.

`build_tables` makes the tables of a run from its configuration and (unless its builder is `random`) its training ids,
and keeps them in the cache folder. The first k experts of a row are active, so sets are nested in k. A table is part of
the model: `table_state` turns it into tensors for a checkpoint. All randomness is stateless
(engine/routing/hashing.py).

A row is an ordering of blocks of `pack` neighbouring experts, and inside each block an ordering of its experts; without
packing all experts are one block. So the first k experts lie in ceil(k / pack) blocks.

Letters: E experts, G blocks of experts, B streams, Q segment length, C ids left of a segment (at least ngram - 1), r
table rows, t tables, s rows seen in training.
"""

import hashlib
import json
import logging
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foreroute.engine.config import Builder, MoEConfig, RouteWeights
from foreroute.engine.routing.hashing import hash64, normal
from foreroute.engine.routing.loops.orders import greedy
from foreroute.engine.routing.ngram_rows import KeyRows, ngram_keys
from foreroute.engine.routing.row_sets import column_dtype
from foreroute.engine.sealed_files import replacing

_FORMAT = 1  # part of the cache key; raise it when the same inputs would give another table
# First part of each hash: what the number is for; engine/routing/ngram_rows.py has 1.
_ORDER, _TIE, _LOGIT, _BLOCK_ORDER, _BLOCK_TIE = range(2, 7)
_NUMBERS = ("ngram", "vocab_size", "seed", "index", "pack")
# Symbols counted, and entries of tables drawn at a time, to bound memory; these fit in a cache.
_CHUNK, _DRAWN = 1 << 22, 1 << 18
# n-grams that may have a counter each (256 MiB); beyond it each occurrence finds its row
_COUNTERS = 1 << 25

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Table:
    """Orderings of the experts by row, and which row an n-gram falls into."""

    order_rE: Tensor  # uint8, or int16 above 256 experts: each row a permutation of all experts
    logits_rE: Tensor | None  # fp32, descending in a row; None for other than table weights
    ngram: int
    vocab_size: int
    seed: int
    index: int  # number of the table within the run
    builder: Builder
    pack: int  # experts of a block: a row uses up one block before it touches the next; E without packing

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
) -> list[Table]:
    """Build tables 0 .. num_tables - 1 of a run, or load them from the cache.

    A table depends on its number but not on num_tables. Builder `random` does not read the training ids.

    Args:
        train_ids: the training split as one stream; ids before its first count as 0.
        cache_dir: folder of .npz files, safe to delete; None for no cache.
        documents: ascending, where in the stream documents begin, at which keys stop; None: one document.
    """
    text = _Text(train_ids, vocab_size, moe.ngram, documents)
    if cache_dir is None:
        arrays = _build(moe, text, num_tables, seed)
    else:
        key = _cache_key(moe, text, num_tables, seed)
        path = cache_dir / f"tables-{key}.npz"
        arrays = _load(path) or _build(moe, text, num_tables, seed)
        if not path.exists():
            try:
                _save(path, arrays)
            except OSError as error:
                _log.warning("the tables are not cached: %s", error)
    order_trE = torch.from_numpy(arrays["order"])
    logits_trE = torch.from_numpy(arrays["logits"]) if "logits" in arrays else None
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
        )
        for index in range(num_tables)
    ]


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
    state["order_rE"] = table.order_rE.contiguous()
    if table.logits_rE is not None:
        state["logits_rE"] = table.logits_rE.contiguous()
    return state


def table_from_state(state: dict[str, Tensor]) -> Table:
    """Rebuild a table from table_state's tensors; a state without `pack` is of a table without packing."""
    state = {"pack": torch.tensor(state["order_rE"].shape[1]), **state}
    return Table(
        order_rE=state["order_rE"],
        logits_rE=state.get("logits_rE"),
        builder=Builder[bytes(state["builder"].tolist()).decode()],
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


def _build(moe: MoEConfig, text: _Text, num_tables: int, seed: int) -> dict[str, NDArray[Any]]:
    """Return order uint8 or int16 [t, r, E] and, for table weights, logits fp32 [t, r, E]."""
    order_trE = np.empty((num_tables, moe.rows, moe.columns), column_dtype(moe.columns))
    pack, freq_tr = moe.pack or moe.columns, np.zeros((num_tables, moe.rows))
    if moe.builder is not Builder.random:
        tables = range(num_tables)
        freq_tr = text.row_frequency([KeyRows(moe.ngram, text.vocab_size, moe.rows, seed, index) for index in tables])
    logits_trE = np.empty(order_trE.shape, np.float32) if moe.weights is RouteWeights.table else None

    def build(index: int) -> None:
        _draw_orders(order_trE[index], np.flatnonzero(freq_tr[index] == 0), pack, seed, index)
        _balance(order_trE[index], freq_tr[index], pack, seed, index)
        if logits_trE is not None:
            _draw_logits(logits_trE[index], moe.spread, seed, index)

    with ThreadPoolExecutor(_threads(num_tables)) as pool:
        list(pool.map(build, range(num_tables)))
    return {"order": order_trE} if logits_trE is None else {"order": order_trE, "logits": logits_trE}


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
        draw_sE = hash64(_ORDER, seed, index, row_s[:, None], np.arange(experts))
        inner_sGp = draw_sE.reshape(-1, blocks, pack).argsort(axis=2)
        inner_sGp += pack * np.arange(blocks)[:, None]
        block_sG = hash64(_BLOCK_ORDER, seed, index, row_s[:, None], np.arange(blocks)).argsort(axis=1)
        order_sGp = np.take_along_axis(inner_sGp, block_sG[:, :, None], axis=1)
        order_rE[row_s] = order_sGp.reshape(-1, experts)


def _draw_logits(logits_rE: NDArray[np.float32], spread: float, seed: int, index: int) -> None:
    """Overwrite with normal logits, descending in each row."""
    rows, experts = logits_rE.shape
    for row_s in _chunks(np.arange(rows), experts):
        draw_sE = spread * normal(hash64(_LOGIT, seed, index, row_s[:, None], np.arange(experts)))
        logits_rE[row_s] = -np.sort(-draw_sE, axis=1)


def _balance(order_rE: NDArray[Any], freq_r: NDArray[np.float64], pack: int, seed: int, index: int) -> None:
    """Overwrite the orderings of rows seen in training so that the load is even at every k.

    One greedy rule orders the blocks of each row and then, block by block, the experts inside. For each row in
    descending frequency (ties by row number) and each choice c in turn: of the things (blocks, or experts of the block
    in turn) that the row has not used, those whose load_c is within the row's frequency of the lightest are candidates;
    a hash of (seed, table, row, c) takes one; then load_c grows by the frequency for every thing among the row's first
    c + 1 choices.
    """
    rows, experts = order_rE.shape
    row_s = np.argsort(-freq_r, kind="stable")[: np.count_nonzero(freq_r)]
    use_s = freq_r[row_s].astype(np.int64)
    block_rG = np.zeros((rows, experts // pack), order_rE.dtype)
    if block_rG.shape[1] > 1:
        greedy(row_s, use_s, np.uint64(hash64(_BLOCK_TIE, seed, index)), np.zeros((rows, 1), order_rE.dtype), block_rG)
    greedy(row_s, use_s, np.uint64(hash64(_TIE, seed, index)), block_rG, order_rE)


def _cache_key(moe: MoEConfig, text: _Text, num_tables: int, seed: int) -> str:
    digest = "" if moe.builder is Builder.random else text.digest()
    names = ("columns", "ngram", "rows", "spread", "pack")
    inputs = [_FORMAT, moe.builder.name, moe.weights.name, *(getattr(moe, name) for name in names)]
    inputs += [text.vocab_size, num_tables, seed, digest]
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
