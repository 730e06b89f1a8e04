"""How far a router's choices are a function of the last ids, and the table that says the same.

OpenMoE (Xue et al. 2024, arXiv 2402.01739) found that learned routers specialise on token ids, whatever the context,
and early in training. Here for each key, an n-gram that ends at a token, the experts that its tokens chose are counted
on one text. On another one each token's set is compared with its key's modal set: as many of the key's most chosen
experts as the token has. A share of 1 means that a table does what the router does. `table_of` makes it.

Letters: N tokens, K experts listed of a token, E experts, G distinct keys, r table rows.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from foreroute.engine.config import Split
from foreroute.engine.data.corpus import PreparedCorpus
from foreroute.engine.routing.hashing import Purpose, hash64, uniform
from foreroute.engine.routing.ngram_rows import KeyRows
from foreroute.engine.routing.planned.given import NONE
from foreroute.engine.routing.row_sets import column_dtype

Experts = NDArray[np.uint16]
Keys = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How the tokens of a text are routed beside the modal sets of their keys."""

    sets: float  # share of the tokens whose set is the modal one of their key
    experts: float  # share of all chosen experts that are in the modal set
    seen: float  # share of the tokens whose key was counted; the others agree in nothing


def input_keys(corpus: PreparedCorpus, split: Split, count: int, rows: KeyRows) -> Keys:
    """Return the key of the input that predicts each of a split's first ids [count], as a run's routers have it.

    Keys stop at document starts.
    """
    left = rows.ngram - 1
    ids = np.asarray(corpus.split(split)[: count - 1], np.int64)
    stream = np.concatenate([[corpus.previous_id(split)], ids])
    begins = np.zeros((1, left + count), bool)
    starts = corpus.document_starts(split)
    begins[0, left + 1 + starts[starts < count - 1]] = True
    ids_BQ, left_BC = torch.from_numpy(stream)[None], torch.zeros(1, left, dtype=torch.int64)
    found: Keys = rows.keys(ids_BQ, left_BC, torch.from_numpy(begins))[0]
    return found


def agreement(
    key_N: Keys, expert_NK: Experts, held_out_key_N: Keys, held_out_NK: Experts, num_experts: int
) -> Agreement:
    """Compare the held-out tokens' sets with the modal sets of the first text's keys.

    Of experts that a key chose equally often the first is the more wanted.

    Args:
        expert_NK: each token's experts; NONE after the last. A token without experts takes no part.
    """
    key_G, place_N = np.unique(key_N, return_inverse=True)
    count_GE = _counts(place_N, expert_NK, len(key_G), num_experts)
    order_GE = np.argsort(-count_GE, axis=1, kind="stable")
    rank_GE = np.argsort(order_GE, axis=1)
    used_NK = held_out_NK != NONE
    number_N = used_NK.sum(axis=1)
    place_N = np.minimum(np.searchsorted(key_G, held_out_key_N), len(key_G) - 1)
    seen_N = key_G[place_N] == held_out_key_N
    rank_NK = rank_GE[place_N[:, None], np.where(used_NK, held_out_NK, 0)]
    hit_NK = used_NK & (rank_NK < number_N[:, None]) & seen_N[:, None]
    routed_N = number_N > 0
    whole_N = routed_N & (hit_NK.sum(axis=1) == number_N)
    tokens = max(int(routed_N.sum()), 1)
    return Agreement(
        float(whole_N.sum() / tokens),
        float(hit_NK.sum() / max(int(number_N.sum()), 1)),
        float((seen_N & routed_N).sum() / tokens),
    )


def table_of(key_N: Keys, expert_NK: Experts, rows: KeyRows, num_experts: int) -> NDArray[np.uint8 | np.int16]:
    """Return each row's experts [r, E], those that the keys which fall into it chose most often first.

    Ties are drawn, so rows that were not seen are spread evenly over the experts.
    """
    count_rE = _counts(rows.of_keys(key_N), expert_NK, rows.rows, num_experts)
    tie_rE = uniform(
        hash64(Purpose.distilled_tie, rows.seed, rows.index, np.arange(rows.rows)[:, None], np.arange(num_experts))
    )
    order_rE = np.argsort(tie_rE - count_rE, axis=1)
    return order_rE.astype(column_dtype(num_experts))


def _counts(row_N: Keys, expert_NK: Experts, rows: int, num_experts: int) -> NDArray[np.int64]:
    """Count how often the tokens of each row chose each expert [rows, E]."""
    used_NK = expert_NK != NONE
    both_NK = row_N[:, None] * num_experts + expert_NK
    return np.bincount(both_NK[used_NK], minlength=rows * num_experts).reshape(rows, num_experts)
