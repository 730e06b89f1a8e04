"""Masks: how many ids are asked for and what replaces them, against the published shares."""

import pytest
import torch

from foreroute.engine.finetune.masking import NOT_ASKED, Vocabulary, mask_ids

VOCABULARY = Vocabulary(size=1000, mask=4, special=(0, 1, 2, 3, 4))


def ids_and_padding(rows=400, length=100, seed=0):
    ids_BQ = torch.randint(5, 1000, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids_BQ[:, 0], ids_BQ[:, -10:] = 2, 0
    return ids_BQ


def test_the_published_shares():
    ids_BQ = ids_and_padding()
    masked = mask_ids(ids_BQ, VOCABULARY, torch.Generator().manual_seed(1))
    asked_BQ = masked.label_BQ != NOT_ASKED
    new_N, old_N = masked.ids_BQ[asked_BQ], ids_BQ[asked_BQ]
    count = len(new_N)
    assert count / (400 * 89) == pytest.approx(0.15, abs=0.01)
    assert (new_N == 4).sum() / count == pytest.approx(0.8, abs=0.02)
    assert (new_N == old_N).sum() / count == pytest.approx(0.1, abs=0.02)
    other_N = new_N[(new_N != 4) & (new_N != old_N)]
    assert len(other_N) / count == pytest.approx(0.1, abs=0.02)
    assert other_N.min() < 50 and other_N.max() > 950 and len(other_N.unique()) > 300  # of the whole vocabulary


def test_all_else_stays():
    ids_BQ = ids_and_padding()
    masked = mask_ids(ids_BQ, VOCABULARY, torch.Generator().manual_seed(1))
    asked_BQ = masked.label_BQ != NOT_ASKED
    assert torch.equal(masked.ids_BQ[~asked_BQ], ids_BQ[~asked_BQ])
    assert torch.equal(masked.label_BQ[asked_BQ], ids_BQ[asked_BQ])
    assert not asked_BQ[:, 0].any() and not asked_BQ[:, -10:].any() and asked_BQ.any(dim=0)[1:-10].all()
    assert mask_ids(ids_BQ, VOCABULARY, torch.Generator(), share=0.0).label_BQ.eq(NOT_ASKED).all()


def test_masks_are_drawn_anew():
    """Each time that a text is seen it has others (dynamic masking); the same generator draws the same."""
    ids_BQ = ids_and_padding(rows=4)
    generator = torch.Generator().manual_seed(1)
    first, second = (mask_ids(ids_BQ, VOCABULARY, generator) for _ in range(2))
    again = mask_ids(ids_BQ, VOCABULARY, torch.Generator().manual_seed(1))
    assert not torch.equal(first.label_BQ, second.label_BQ)
    assert torch.equal(first.label_BQ, again.label_BQ) and torch.equal(first.ids_BQ, again.ids_BQ)


def test_where_masks_are_does_not_depend_on_the_ids():
    one, other = (mask_ids(ids_and_padding(8, seed=s), VOCABULARY, torch.Generator().manual_seed(1)) for s in (0, 1))
    assert torch.equal(one.label_BQ == NOT_ASKED, other.label_BQ == NOT_ASKED)
