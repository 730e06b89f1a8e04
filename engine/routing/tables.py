"""Tables: the fixed map of a hashed router from the n-gram that ends at a token to an ordering of all experts.

`build_tables` makes the tables of a run from its configuration and (unless its builder is `random`) its training ids,
and keeps them in the cache folder. The first k experts of a row are active, so sets are nested in k. A table is part of
the model: `table_state` turns it into tensors for a checkpoint. All randomness is stateless
(engine/routing/hashing.py).

A row is an ordering of blocks of `pack` neighbouring experts, and inside each block an ordering of its experts; without
packing all experts are one block. So the first k experts lie in ceil(k / pack) blocks.

Letters: E experts, G blocks of experts, B streams, Q segment length, C ids left of a segment (at least ngram - 1), r
table rows, t tables, s rows seen in training, w waves.
"""

import hashlib
import json
import logging
import os
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foreroute.engine.config import Builder, MoEConfig, RouteWeights
from foreroute.engine.routing.hashing import hash64, normal, uniform
from foreroute.engine.routing.ngram_rows import KeyRows

_FORMAT = 1  # part of the cache key; raise it when the same inputs would give another table
# First part of each hash: what the number is for; engine/routing/ngram_rows.py has 1.
_ORDER, _TIE, _LOGIT, _BLOCK_ORDER, _BLOCK_TIE = range(2, 7)
_NUMBERS = ("ngram", "vocab_size", "seed", "index", "pack")
_CHUNK = 1 << 22  # symbols counted at a time, to bound memory
# n-grams that may have a counter each (256 MiB); beyond it those that occur are sorted
_COUNTERS = 1 << 25

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Table:
    """Orderings of the experts by row, and which row an n-gram falls into."""

    order_rE: Tensor  # uint8: each row a permutation of all experts
    logits_rE: Tensor | None  # fp32, descending in a row; None for uniform weights
    ngram: int
    vocab_size: int
    seed: int
    index: int  # number of the table within the run
    builder: Builder
    pack: int  # experts of a block: a row uses up one block before it touches the next; E without packing

    @property
    def key_rows(self) -> KeyRows:
        """How an n-gram finds its row."""
        rows = self.order_rE.shape[0]
        return KeyRows(self.ngram, self.vocab_size, rows, self.seed, self.index)

    def rows_of(self, ids_BQ: Tensor, left_BC: Tensor) -> Tensor:
        """Return the int64 row [B, Q] of each id, given the true ids left of each segment."""
        return self.key_rows.of(ids_BQ, left_BC)


def build_tables(
    moe: MoEConfig,
    vocab_size: int,
    train_ids: NDArray[np.integer[Any]],
    *,
    num_tables: int,
    seed: int,
    cache_dir: Path | None,
) -> list[Table]:
    """Build tables 0 .. num_tables - 1 of a run, or load them from the cache.

    A table depends on its number but not on num_tables. Builder `random` does not read the training ids.

    Args:
        train_ids: the training split as one stream; ids before its first count as 0.
        cache_dir: folder of .npz files, safe to delete; None for no cache.
    """
    if cache_dir is None:
        arrays = _build(moe, vocab_size, train_ids, num_tables, seed)
    else:
        key = _cache_key(moe, vocab_size, train_ids, num_tables, seed)
        path = cache_dir / f"tables-{key}.npz"
        arrays = _load(path) or _build(moe, vocab_size, train_ids, num_tables, seed)
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
            pack=moe.pack or moe.experts,
        )
        for index in range(num_tables)
    ]


def row_frequency(table: Table, ids: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """Return how often a text uses each row [r]; ids before its first count as 0."""
    keys, counts = _ngram_counts(ids, table.vocab_size, table.ngram)
    rows = table.order_rE.shape[0]
    return np.bincount(table.key_rows.of_keys(keys), counts, rows).astype(np.float64, copy=False)


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


def _ngram_counts(
    ids: NDArray[np.integer[Any]], vocab_size: int, ngram: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the n-gram numbers that occur in a stream, ascending, and how often."""
    chunks = _ngram_keys(ids, vocab_size, ngram)
    if vocab_size**ngram <= _COUNTERS:
        counts = np.zeros(vocab_size**ngram, np.int64)
        for key in chunks:
            counts += np.bincount(key, minlength=counts.size)
        keys = np.flatnonzero(counts)
        return keys, counts[keys]
    found = [np.unique(key, return_counts=True) for key in chunks]
    keys, place = np.unique(np.concatenate([key for key, _ in found]), return_inverse=True)
    counts = np.zeros(keys.size, np.int64)
    np.add.at(counts, place, np.concatenate([count for _, count in found]))
    return keys, counts


def _ngram_keys(ids: NDArray[np.integer[Any]], vocab_size: int, ngram: int) -> Iterator[NDArray[np.int64]]:
    """Yield the number of the n-gram that ends at each id, a chunk at a time."""
    padded = np.concatenate([np.zeros(ngram - 1, ids.dtype), ids])
    for start in range(0, ids.size, _CHUNK):
        part = padded[start : start + _CHUNK + ngram - 1].astype(np.int64)
        size = part.size - ngram + 1
        key = part[:size]
        for shift in range(1, ngram):
            key = key * vocab_size + part[shift : shift + size]
        yield key


def _build(
    moe: MoEConfig, vocab_size: int, train_ids: NDArray[np.integer[Any]], num_tables: int, seed: int
) -> dict[str, NDArray[Any]]:
    """Return order uint8 [t, r, E] and, for table weights, logits fp32 [t, r, E]."""
    row_r1, expert_E = np.arange(moe.rows)[:, None], np.arange(moe.experts)
    pack = moe.pack or moe.experts
    order_trE = np.empty((num_tables, moe.rows, moe.experts), np.uint8)
    for index, order_rE in enumerate(order_trE):
        order_rE[:] = _random_order(moe.rows, moe.experts, pack, seed, index)
    if moe.builder is not Builder.random:
        keys, counts = _ngram_counts(train_ids, vocab_size, moe.ngram)
        freq_tr = np.empty((num_tables, moe.rows))
        for index, freq_r in enumerate(freq_tr):
            row = KeyRows(moe.ngram, vocab_size, moe.rows, seed, index).of_keys(keys)
            freq_r[:] = np.bincount(row, weights=counts, minlength=moe.rows)
        _balance(order_trE, freq_tr, pack, seed)
    if moe.weights is RouteWeights.uniform:
        return {"order": order_trE}
    logits_trE = np.empty(order_trE.shape, np.float32)
    for index, logits_rE in enumerate(logits_trE):
        draw_rE = moe.spread * normal(hash64(_LOGIT, seed, index, row_r1, expert_E))
        logits_rE[:] = -np.sort(-draw_rE, axis=1)
    return {"order": order_trE, "logits": logits_trE}


def _random_order(rows: int, experts: int, pack: int, seed: int, index: int) -> NDArray[np.int64]:
    """Return for each row a random ordering of its blocks, and of the experts inside each block, [r, E]."""
    row_r1, blocks = np.arange(rows)[:, None], experts // pack
    draw_rE = hash64(_ORDER, seed, index, row_r1, np.arange(experts))
    inner_rGp = draw_rE.reshape(rows, blocks, pack).argsort(axis=2)
    inner_rGp += pack * np.arange(blocks)[:, None]
    block_rG = hash64(_BLOCK_ORDER, seed, index, row_r1, np.arange(blocks)).argsort(axis=1)
    return np.take_along_axis(inner_rGp, block_rG[:, :, None], axis=1).reshape(rows, experts)


def _balance(order_trE: NDArray[np.uint8], freq_tr: NDArray[np.float64], pack: int, seed: int) -> None:
    """Overwrite the orderings of rows seen in training so that the load is even at every k.

    One greedy rule orders the blocks of each row and then, block by block, the experts inside. For each row in
    descending frequency (ties by row number) and each choice c in turn: of the things (blocks, or experts of the block
    in turn) that the row has not used, those whose load_c is within the row's frequency of the lightest are candidates;
    a hash of (seed, table, row, c) takes one; then load_c grows by the frequency for every thing among the row's first
    c + 1 choices.
    """
    experts = order_trE.shape[2]
    seen = (freq_tr > 0).sum(axis=1)
    row_ts = np.argsort(-freq_tr, axis=1, kind="stable")[:, : seen.max()]
    freq_ts = np.take_along_axis(freq_tr, row_ts, axis=1)
    anywhere = np.zeros((*row_ts.shape, experts // pack), np.uint8)
    block_tsG = _greedy(row_ts, freq_ts, anywhere, experts // pack, (_BLOCK_TIE, seed))
    expert_tsE = _greedy(row_ts, freq_ts, block_tsG.repeat(pack, axis=2), pack, (_TIE, seed))
    for index, num_seen in enumerate(seen):  # the other tables' further rows are padding
        order_trE[index, row_ts[index, :num_seen]] = expert_tsE[index, :num_seen]


def _greedy(
    row_ts: NDArray[np.int64],
    freq_ts: NDArray[np.float64],
    block_tsE: NDArray[np.uint8],
    pack: int,
    tie: tuple[int, int],
) -> NDArray[np.uint8]:
    """Order the E things of each row by _balance's rule; choice c of a row is from block block_tsE[.., c].

    Choice c of a row needs only the row's earlier choices and load_c after the row before, so wave w makes choice c of
    row w - c for all c and tables at once: slot t*E + c of the arrays below. All counts are exact in float64.

    Args:
        row_ts: row numbers in the order in which they choose.
        freq_ts: their frequencies.
        pack: things of a block; thing e is in block e // pack.
        tie: purpose and seed of the tie-breaking hash.
    """
    num_tables, seen, things = block_tsE.shape
    shape = seen + things - 1, num_tables, things
    freq_wtE, draw_wtE, block_wtE = np.zeros(shape), np.zeros(shape), np.zeros(shape, np.uint8)
    for index, row_s in enumerate(row_ts):
        for choice in range(things):
            wave = slice(choice, choice + seen)
            freq_wtE[wave, index, choice] = freq_ts[index]
            draw_wtE[wave, index, choice] = uniform(hash64(*tie, index, row_s, choice))
            block_wtE[wave, index, choice] = block_tsE[index, :, choice]
    chosen_wtE = _waves(freq_wtE, draw_wtE, block_wtE, pack)
    chosen_tsE = np.empty_like(block_tsE)
    for choice in range(things):
        chosen_tsE[:, :, choice] = chosen_wtE[choice : choice + seen, :, choice].T
    return chosen_tsE


def _waves(
    freq_wtE: NDArray[np.float64], draw_wtE: NDArray[np.float64], block_wtE: NDArray[np.uint8], pack: int
) -> NDArray[np.uint8]:
    """Return the thing chosen in each wave and slot (see _greedy); slots without a row have frequency 0."""
    num_waves, num_tables, things = freq_wtE.shape
    thing_E1 = np.arange(things, dtype=np.uint8)[:, None]
    home_E1 = thing_E1 // np.uint16(pack)
    load = np.zeros((things, num_tables * things))  # [thing, slot]
    used = np.zeros(load.shape, bool)  # things that the row in each slot has used
    chosen = np.empty((num_waves, load.shape[1]), np.uint8)
    slots = (x.reshape(num_waves, -1) for x in (freq_wtE, draw_wtE, block_wtE))
    for wave, (freq, draw, block) in enumerate(zip(*slots, strict=True)):
        cost = np.where(used | (home_E1 != block), np.inf, load)
        candidate = cost <= cost.min(axis=0) + freq
        rank = candidate.cumsum(axis=0, dtype=np.uint16)
        pick = (draw * rank[-1]).astype(np.uint16)  # 0 .. candidates - 1
        chosen[wave] = (rank <= pick).sum(axis=0, dtype=np.uint8)  # first thing with rank pick + 1
        used |= thing_E1 == chosen[wave]
        load += used * freq
        used[:, 1:] = used[:, :-1]  # each row moves on to its next choice
        used[:, ::things] = False  # and a new row enters at choice 0
    return chosen.reshape(num_waves, num_tables, things)


def _cache_key(moe: MoEConfig, vocab_size: int, train_ids: NDArray[np.integer[Any]], num_tables: int, seed: int) -> str:
    text = b""
    if moe.builder is not Builder.random:
        text = hashlib.sha256(np.ascontiguousarray(train_ids).data).digest()
    names = ("experts", "ngram", "rows", "spread", "pack")
    inputs = [_FORMAT, moe.builder.name, moe.weights.name, *(getattr(moe, name) for name in names)]
    inputs += [vocab_size, num_tables, seed, text.hex()]
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
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder) / path.name
        with part.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        os.replace(part, path)
