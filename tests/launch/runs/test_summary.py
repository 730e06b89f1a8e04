"""What counting gets, on as much text as the evaluation has."""

from types import SimpleNamespace

import numpy as np
import pytest

from foreroute.engine.config import Split, Tokens
from foreroute.engine.data.tokens.byte_values import ByteVocab
from foreroute.engine.evaluation.ngram_baselines import bzip2_bpc, order_n_bpc
from foreroute.launch.runs.summary import COUNTED_PER_SYMBOL, counting_baselines

V = 4
TRAIN, TEST = (np.random.default_rng(seed).integers(0, V, 3000).astype(np.uint8) for seed in (1, 2))
CORPUS = SimpleNamespace(
    split=lambda split: TRAIN if split is Split.train else TEST, vocab=ByteVocab(Tokens.txl, bytes(range(V)))
)


@pytest.mark.parametrize("max_symbols", [0, 7, 30, 2999])
def test_max_symbols_shortens_what_is_scored_and_of_a_long_text_what_is_counted(monkeypatch, max_symbols):
    assert "counted_symbols" not in counting_baselines(CORPUS, Split.test, 7)  # a short one
    monkeypatch.setattr("foreroute.launch.runs.summary.COUNTED_AT_LEAST", 0)
    seen = []
    found = counting_baselines(CORPUS, Split.test, max_symbols, lambda *parts: seen.append(parts))
    counted, scored = TRAIN[: COUNTED_PER_SYMBOL * max_symbols or None], TEST[: max_symbols or None]
    assert found["order3_bpc"] == order_n_bpc(counted, scored, 3, V)
    assert found["order2_bpc"] == order_n_bpc(counted, scored, 2, V)
    assert found["bzip2_bpc"] == bzip2_bpc([scored.tobytes()])
    assert found.get("counted_symbols") == (700 if max_symbols == 7 else None)
    assert [parts for parts in seen if parts[1] == 0 or parts[1] == parts[2]] == [
        ("order 2", 0, 2),
        ("order 2", 2, 2),
        ("order 3", 0, 2),
        ("order 3", 2, 2),
        ("bzip2 -9", 0, 1),
        ("bzip2 -9", 1, 1),
    ]
    whole = order_n_bpc(TRAIN, scored, 3, V)  # control
    assert (found["order3_bpc"] == whole) == (max_symbols != 7)
