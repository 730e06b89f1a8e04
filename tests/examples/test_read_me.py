"""Read-ME's network in whole numbers against loops of Python's own numbers and of floats; plans of ranks."""

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from examples.routers.read_me import NAMES, ONE, NetworkRouter, logits
from foreroute.engine.config import MoEConfig
from foreroute.engine.errors import UserError
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.planned_router import GroupTokens, RouterInputs
from tests.examples.on_ranks import assert_two_ranks_train_like_one
from tests.references import read_me as reference

SYMBOLS, EXPERTS, WIDTH = 9, 4, 6


def moe(**options):
    return MoEConfig(experts=EXPERTS, options={"width": WIDTH, **options})


def router(**options):
    (found,) = NetworkRouter.build(moe(**options), RouterInputs(SYMBOLS, 5, 3))
    return found


def ids(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, SYMBOLS, shape)


@pytest.mark.method
def test_the_network_equals_loops_over_whole_numbers():
    network, ids_NQ = router().network, ids(3, 12)
    plain = [network[name].tolist() for name in NAMES]
    want = [reference.whole_logits(row, *plain) for row in ids_NQ.tolist()]
    assert logits(ids_NQ, network).tolist() == want


@pytest.mark.method
def test_the_network_is_the_published_one_but_for_rounding():
    """And near it, not just in the choices: to some hundredths of a logit's spread."""
    network, ids_NQ = router().network, ids(3, 12)
    plain = [(network[name] / ONE).tolist() for name in NAMES]
    want = np.array([reference.float_logits(row, *plain) for row in ids_NQ.tolist()])
    got = logits(ids_NQ, network) / ONE**2
    assert np.abs(got - want).max() < 0.1 * want.std()
    first, second = np.sort(want, axis=2)[..., -1], np.sort(want, axis=2)[..., -2]
    clear = first - second > 0.2 * want.std()
    assert clear.mean() > 0.5 and (got.argmax(axis=2) == want.argmax(axis=2))[clear].all()


def test_it_sees_the_ids_before_and_none_after():
    ids_NQ, other = ids(1, 10), ids(1, 10)
    other[0, 5] = (other[0, 5] + 1) % SYMBOLS
    one, two = (logits(x, router().network)[0] for x in (ids_NQ, other))
    assert np.array_equal(one[:5], two[:5]) and not np.array_equal(one[5], two[5])
    assert (one[6:] != two[6:]).any(axis=1).all()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_each_rank_plans_what_the_network_chooses_alone(ranks):
    """Plans of all ranks together hold the choices that one stream at a time would have."""
    ids_PBQ = torch.from_numpy(ids(ranks, 2, 7))
    tokens = GroupTokens(ids_PBQ, ids_PBQ[..., :1])
    want = np.zeros(EXPERTS, np.int64)
    for row in ids_PBQ.flatten(0, 1).numpy():
        choice_QE = (-logits(row[None], router().network)[0]).argsort(axis=1, kind="stable")
        want += np.bincount(choice_QE[:, :2].ravel(), minlength=EXPERTS)
    places = [Mesh(rank, ranks, ranks) for rank in range(ranks)]
    plans = [router().place(mesh).plan(tokens, 2) for mesh in places]
    assert all(plan.count_E.tolist() == want.tolist() for plan in plans)
    rows = [np.diff(plan.chunks[0].rows.offset_L.numpy(), prepend=0) for plan in plans]
    assert np.concatenate(rows).tolist() == want.tolist()


def test_saved_and_read_weights(tmp_path):
    found = router()
    ((again,), path) = NetworkRouter.restore(moe(), RouterInputs(SYMBOLS, 0, 3), [found.state()]), tmp_path / "n"
    save_file({name: (value / ONE).astype(np.float32) for name, value in found.network.items()}, path)
    for other in (again, router(weights=str(path))):
        assert all(np.array_equal(a, b) for a, b in zip(found.identity(), other.identity(), strict=True))
    with pytest.raises(UserError, match=r"embedding has the shape \(9, 6\), must be \(9, 5\)"):
        router(weights=str(path), width=5)
    (tmp_path / "bad").write_bytes(b"no tensors")
    for name in ("none", "bad"):
        with pytest.raises(UserError, match=rf"moe\.options\.weights=.*{name}: cannot be read"):
            router(weights=str(tmp_path / name))


@pytest.mark.dist
def test_two_ranks_train_like_one():
    """With one router for both layers."""
    assert_two_ranks_train_like_one("read_me:NetworkRouter", options={"width": 8})
