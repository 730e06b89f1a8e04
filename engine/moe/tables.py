"""Tables: the fixed map of a hashed router from the n-gram that ends at a token to an ordering of all experts.

`build_tables` makes the tables of a run from its configuration and (builder `balanced`) its training ids, and keeps them
in the cache folder. The first k experts of a row are active, so sets are nested in k. A table is part of the model:
`table_state` turns it into tensors for a checkpoint. All randomness is stateless (engine/moe/hashing.py).

Letters: E experts, B streams, Q segment length, C = ngram - 1 ids left of a segment, r table rows, t tables.
"""

import hashlib
import json
import logging
import os
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.config import Builder, MoEConfig, RouteWeights
from engine.moe.hashing import hash64, normal, uniform

_FORMAT = 1  # part of the cache key; raise it when the same inputs would give another table
_ROW, _ORDER, _TIE, _LOGIT = 1, 2, 3, 4  # first part of each hash: what the number is for
_NUMBERS = ("ngram", "vocab_size", "seed", "index")
_CHUNK = 1 << 22  # symbols counted at a time, to bound memory

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

    def rows_of(self, ids_BQ: Tensor, left_BC: Tensor) -> Tensor:
        """Return the int64 row [B, Q] of each id, given the C true ids left of each segment.

        Example: bigrams of 10 symbols in at least 100 rows: ids [[3, 4]] with left [[7]] give rows [[73, 34]].
        """
        segment, context = ids_BQ.shape[1], left_BC.shape[1]
        if context != self.ngram - 1:
            raise ValueError(
                f"left_BC has {context} ids: ngram={self.ngram} needs {self.ngram - 1}"
            )
        stream = torch.cat([left_BC, ids_BQ], dim=1).numpy()
        key_BQ = stream[:, :segment]
        for shift in range(1, self.ngram):
            key_BQ = key_BQ * self.vocab_size + stream[:, shift : shift + segment]
        return torch.from_numpy(self.keys_to_rows(key_BQ))

    def keys_to_rows(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows of n-grams given as numbers (base vocab_size, newest id last): the number itself if all fit."""
        rows = self.order_rE.shape[0]
        if self.vocab_size**self.ngram <= rows:
            return keys
        return _hashed_rows(keys, rows, self.seed, self.index)


def build_tables(
    moe: MoEConfig,
    vocab_size: int,
    train_ids: NDArray[np.uint8],
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
        )
        for index in range(num_tables)
    ]


def load_balance(table: Table, ids: NDArray[np.uint8], k: int) -> float:
    """Return max / mean over the experts of the expert rows that a text gives at k active experts; 1 is perfect."""
    keys, counts = _ngram_counts(ids, table.vocab_size, table.ngram)
    order_rE = table.order_rE.numpy()
    load_E = np.zeros(order_rE.shape[1])
    for expert_n in order_rE[table.keys_to_rows(keys), :k].T:
        load_E += np.bincount(expert_n, weights=counts, minlength=load_E.size)
    return float(load_E.max() / load_E.mean())


def table_state(table: Table) -> dict[str, Tensor]:
    """Turn a table into tensors for a checkpoint; table_from_state is the inverse."""
    state = {name: torch.tensor(getattr(table, name)) for name in _NUMBERS}
    state["builder"] = torch.tensor(list(table.builder.name.encode()), dtype=torch.uint8)
    state["order_rE"] = table.order_rE.contiguous()
    if table.logits_rE is not None:
        state["logits_rE"] = table.logits_rE.contiguous()
    return state


def table_from_state(state: dict[str, Tensor]) -> Table:
    """Rebuild a table from table_state's tensors."""
    return Table(
        order_rE=state["order_rE"],
        logits_rE=state.get("logits_rE"),
        builder=Builder[bytes(state["builder"].tolist()).decode()],
        **{name: int(state[name]) for name in _NUMBERS},
    )


def _hashed_rows(keys: NDArray[np.int64], rows: int, seed: int, index: int) -> NDArray[np.int64]:
    return (hash64(_ROW, seed, index, keys) % np.uint64(rows)).astype(np.int64)


def _ngram_counts(
    ids: NDArray[np.uint8], vocab_size: int, ngram: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the n-gram numbers that occur in a stream, ascending, and how often."""
    counts = np.zeros(vocab_size**ngram, np.int64)
    padded = np.concatenate([np.zeros(ngram - 1, ids.dtype), ids])
    for start in range(0, ids.size, _CHUNK):
        part = padded[start : start + _CHUNK + ngram - 1].astype(np.int64)
        size = part.size - ngram + 1
        key = part[:size]
        for shift in range(1, ngram):
            key = key * vocab_size + part[shift : shift + size]
        counts += np.bincount(key, minlength=counts.size)
    keys = np.flatnonzero(counts)
    return keys, counts[keys]


def _build(
    moe: MoEConfig, vocab_size: int, train_ids: NDArray[np.uint8], num_tables: int, seed: int
) -> dict[str, NDArray[Any]]:
    """Return order uint8 [t, r, E] and, for table weights, logits fp32 [t, r, E]."""
    row_r1, expert_E = np.arange(moe.rows)[:, None], np.arange(moe.experts)
    order_trE = np.empty((num_tables, moe.rows, moe.experts), np.uint8)
    for index, order_rE in enumerate(order_trE):
        order_rE[:] = hash64(_ORDER, seed, index, row_r1, expert_E).argsort(axis=1)
    if moe.builder is Builder.balanced:
        keys, counts = _ngram_counts(train_ids, vocab_size, moe.ngram)
        freq_tr = np.empty((num_tables, moe.rows))
        for index, freq_r in enumerate(freq_tr):
            exact = vocab_size**moe.ngram <= moe.rows
            row = keys if exact else _hashed_rows(keys, moe.rows, seed, index)
            freq_r[:] = np.bincount(row, weights=counts, minlength=moe.rows)
        _balance(order_trE, freq_tr, seed)
    if moe.weights is RouteWeights.uniform:
        return {"order": order_trE}
    logits_trE = np.empty(order_trE.shape, np.float32)
    for index, logits_rE in enumerate(logits_trE):
        draw_rE = moe.spread * normal(hash64(_LOGIT, seed, index, row_r1, expert_E))
        logits_rE[:] = -np.sort(-draw_rE, axis=1)
    return {"order": order_trE, "logits": logits_trE}


def _balance(order_trE: NDArray[np.uint8], freq_tr: NDArray[np.float64], seed: int) -> None:
    """Overwrite the orderings of rows seen in training so that the load is even at every k.

    For each row in descending frequency (ties by row number) and each choice c in turn: of the experts that the row has
    not used, those whose load_c is within the row's frequency of the lightest are candidates; a hash of (seed, table,
    row, c) takes one; then load_c grows by the frequency for every expert among the row's first c + 1 choices.

    Choice c of a row needs only the row's earlier choices and load_c after the row before, so wave w makes choice c of
    row w - c for all c and tables at once: slot t*E + c of the arrays below. All counts are exact in float64.
    """
    num_tables, _, experts = order_trE.shape
    row_ts = np.argsort(-freq_tr, axis=1, kind="stable")[:, : (freq_tr > 0).sum(axis=1).max()]
    seen = row_ts.shape[1]
    freq_wtE, draw_wtE = np.zeros((2, seen + experts - 1, num_tables, experts))
    for index, row_s in enumerate(row_ts):
        for choice in range(experts):
            wave = slice(choice, choice + seen)
            freq_wtE[wave, index, choice] = freq_tr[index, row_s]
            draw_wtE[wave, index, choice] = uniform(hash64(_TIE, seed, index, row_s, choice))
    chosen_wtE = _waves(freq_wtE, draw_wtE)
    for index, row_s in enumerate(row_ts):
        num_seen = np.count_nonzero(freq_tr[index])  # the other tables' further rows are padding
        for choice in range(experts):
            chosen = chosen_wtE[choice : choice + num_seen, index, choice]
            order_trE[index, row_s[:num_seen], choice] = chosen


def _waves(freq_wtE: NDArray[np.float64], draw_wtE: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return the expert chosen in each wave and slot (see _balance); slots of padding have frequency 0."""
    num_waves, num_tables, experts = freq_wtE.shape
    expert_E1 = np.arange(experts)[:, None]
    load = np.zeros((experts, num_tables * experts))  # [expert, slot]
    used = np.zeros(load.shape, bool)  # experts that the row now in each slot has used
    chosen = np.empty((num_waves, load.shape[1]), np.uint8)
    for wave, (freq, draw) in enumerate(
        zip(freq_wtE.reshape(num_waves, -1), draw_wtE.reshape(num_waves, -1), strict=True)
    ):
        cost = np.where(used, np.inf, load)
        candidate = cost <= cost.min(axis=0) + freq
        rank = candidate.cumsum(axis=0, dtype=np.uint16)
        pick = (draw * rank[-1]).astype(np.uint16)  # 0 .. candidates - 1
        chosen[wave] = (rank <= pick).sum(axis=0, dtype=np.uint8)  # first expert with rank pick + 1
        used |= expert_E1 == chosen[wave]
        load += used * freq
        used[:, 1:] = used[:, :-1]  # each row moves on to its next choice
        used[:, ::experts] = False  # and a new row enters at choice 0
    return chosen.reshape(num_waves, num_tables, experts)


def _cache_key(
    moe: MoEConfig, vocab_size: int, train_ids: NDArray[np.uint8], num_tables: int, seed: int
) -> str:
    text = b""
    if moe.builder is Builder.balanced:
        text = hashlib.sha256(np.ascontiguousarray(train_ids).data).digest()
    names = ("experts", "ngram", "rows", "spread")
    inputs = [_FORMAT, moe.builder.name, moe.weights.name, *(getattr(moe, name) for name in names)]
    inputs += [vocab_size, num_tables, seed, text.hex()]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:32]


def _load(path: Path) -> dict[str, NDArray[Any]] | None:
    """Read cached arrays; None if there are none or the file is damaged (it is then removed, with a warning)."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
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
