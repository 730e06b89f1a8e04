"""n-grams with nothing in them but their text, against plain loops over ids."""

import pytest
import torch

from foreroute.engine.errors import UserError
from foreroute.engine.parallel.cpu_group import CpuGroup
from foreroute.engine.plug_in.plan_inputs import left_of_part
from foreroute.engine.plug_in.plans import Sequences, keep_to_texts
from foreroute.engine.testing.ranks import run_threads


def ngrams(ids, left, mask, documents):
    """Walk left from each id until its text begins; [B][Q] tuples of C + 1 ids."""
    found = []
    for b, row in enumerate(ids.tolist()):
        stream = left[b].tolist() + row
        start = left.shape[1]
        found.append([])
        for q in range(len(row)):
            gram, inside = [], True
            for back in range(start + 1):
                place = q - back
                if back and place + 1 >= 1 and documents[b, place + 1] != documents[b, max(place, 0)]:
                    inside = False
                if place >= 0 and not mask[b, place]:
                    inside = False
                gram.insert(0, stream[start + place] if inside else 0)
            found[-1].append(tuple(gram))
    return found


def grams_of(ids, left):
    """The n-grams in sequences [B, Q] with left context, as the router reads them."""
    return torch.cat((left, ids), dim=-1).unfold(-1, left.shape[-1] + 1, 1)


@pytest.mark.parametrize("context", [0, 1, 3])
@pytest.mark.parametrize("first", [False, True])
def test_against_plain_loops(context, first):
    torch.manual_seed(context)
    ids, left = torch.randint(1, 50, (4, 8)), torch.randint(1, 50, (4, context))
    mask = torch.ones(4, 8, dtype=torch.bool)
    mask[1, :3], mask[2, 5:], left[1] = False, False, 0
    documents = torch.tensor([[0] * 8, [1, 1, 1, 2, 2, 2, 3, 3], [0, 1, 0, 1, 1, 1, 1, 1], [5] * 8])
    want = ngrams(ids, left, mask, documents)
    got = grams_of(*keep_to_texts(Sequences(ids, left, mask, documents, first), ids, left))
    got = got.view(8, 4, -1).transpose(0, 1) if first else got.view(4, 8, -1)
    pairs = [(tuple(got[b, q].tolist()), want[b][q]) for b in range(4) for q in range(8) if mask[b, q]]
    assert all(a == b for a, b in pairs)
    if context:  # negative control
        plain = grams_of(ids, left)
        assert any(tuple(plain[b, q].tolist()) != want[b][q] for b in range(4) for q in range(8) if mask[b, q])


@pytest.mark.parametrize("given", [(), ("mask",), ("documents",), ("mask", "documents")])
@pytest.mark.parametrize("context", [0, 1, 3])
def test_parts_of_sequences_against_plain_loops(given, context):
    """Four ranks with 4, 1, 0 and 3 ids of each sequence."""
    torch.manual_seed(context)
    ids, starts = torch.randint(1, 50, (4, 8)), [0, 4, 5, 5, 8]
    mask, documents = torch.ones(4, 8, dtype=torch.bool), torch.zeros(4, 8, dtype=torch.int64)
    if "mask" in given:
        mask[1, :5], mask[2, 3:], mask[3, :7] = False, False, False
    if "documents" in given:
        documents[0, 4:], documents[1, 6:], documents[2, ::2] = 1, 1, 1
    want = ngrams(ids, torch.zeros(4, context, dtype=torch.int64), mask, documents)

    def work(group):
        part = slice(*starts[group.rank : group.rank + 2])
        whole = {"mask": mask, "documents": documents}
        sequences = Sequences(ids[:, part], **{name: whole[name][:, part] for name in given})
        left = left_of_part(sequences, ids[:, part], context, group)
        kept = keep_to_texts(sequences, ids[:, part], left)
        shape = 4, part.stop - part.start, context + 1
        return grams_of(*kept).reshape(shape) if shape[1] else torch.zeros(shape, dtype=torch.int64)

    answers = run_threads(work, 4)
    got = torch.cat(answers, dim=1)
    pairs = [(tuple(got[b, q].tolist()), want[b][q]) for b in range(4) for q in range(8) if mask[b, q]]
    assert len(pairs) >= 15 and all(a == b for a, b in pairs)
    if context and not given:  # negative control
        alone = grams_of(ids[:, 4:5], torch.zeros(4, context, dtype=torch.int64))
        assert not torch.equal(alone[:, 0], got[:, 4])


def test_parts_that_do_not_fit_are_named():
    ids = torch.ones(3, 4, dtype=torch.int64)

    def work(group):
        rows = ids[: 2 + group.rank]
        return left_of_part(Sequences(rows), rows, 2, group)

    fault = "the parts of a sequence differ in their number of sequences: [2, 3], from left to right"
    assert [str(error) for error in run_threads(work, 2)] == [fault] * 2
    with pytest.raises(UserError, match="parts of sequences: take ids"):
        left_of_part(Sequences(ids, ids[:, :1]), ids, 1, CpuGroup())
    with pytest.raises(UserError, match=r"mask of shape \[3, 5\]"):
        left_of_part(Sequences(ids, mask=torch.ones(3, 5)), ids, 1, CpuGroup())


def test_the_example():
    ids, left, documents = (torch.tensor([row]) for row in ([3, 4, 5], [9], [0, 1, 1]))
    ids, left = keep_to_texts(Sequences(ids, left, documents=documents), ids, left)
    assert ids.tolist() == [[3], [4], [5]] and left.tolist() == [[9], [0], [4]]


def test_nothing_is_said_nothing_changes():
    ids, left = torch.ones(2, 3), torch.ones(2, 1)
    got = keep_to_texts(Sequences(ids, left), ids, left)
    assert got[0] is ids and got[1] is left


def test_a_mask_of_another_shape_is_refused():
    ids, left = torch.ones(2, 3), torch.ones(2, 1)
    with pytest.raises(UserError, match=r"mask of shape \[2, 4\]: must be \[2, 3\] as ids"):
        keep_to_texts(Sequences(ids, left, torch.ones(2, 4)), ids, left)
