"""moe.router=by_frequency against Webster's method, numbers from a file, and a certificate."""

import os
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.counts.placement import Placement
from foreroute.engine.certificate.counts.replay import replay
from foreroute.engine.config import Config, DataConfig, EvalConfig, ModelConfig, MoEConfig, ScheduleConfig, TrainConfig
from foreroute.engine.errors import UserError
from foreroute.engine.routing.planned.by_frequency import ByFrequencyRouter
from foreroute.engine.routing.planned.hashed import HashedRouter
from foreroute.engine.routing.planned_router import RouterInputs
from foreroute.engine.routing.tables import row_frequency
from foreroute.engine.testing.planned import planned_counts
from tests.engine.routing.methods.test_top_p import check_numbers
from tests.references.webster import shares

VOCAB = 30
MOE = MoEConfig(router="by_frequency", experts=8, ngram=2, rows=1000)


def text(size=20_000, vocab=VOCAB, seed=0):
    share = 1 / np.arange(3, vocab + 3)
    return np.random.default_rng(seed).choice(vocab, size, p=share / share.sum()).astype(np.uint8)


def build(moe=MOE, *, number=1, ids=None, vocab=VOCAB, seed=5, **options):
    moe = replace(moe, options={**moe.options, **options})
    ids = text(vocab=vocab) if ids is None else ids
    return ByFrequencyRouter.build(moe, RouterInputs(vocab, seed, number, ids))


def is_apportioned(weights, counts, least, most):
    """Is there a divisor by which Webster's method gives these numbers, within least and most? Of equal weights some
    may be one more."""
    lowest = max(Fraction(w) / (c + Fraction(1, 2)) for w, c in zip(weights, counts, strict=True) if c < most)
    highest = [Fraction(w) / (c - Fraction(1, 2)) for w, c in zip(weights, counts, strict=True) if c > least]
    if lowest > min(highest):
        return False
    strictly = lowest < min(highest)
    by_divisor = [min(max(n, least), most) for n in shares([Fraction(w) for w in weights], min(highest))]
    return not strictly or by_divisor == list(counts)


@pytest.mark.method
@pytest.mark.parametrize("least", [0, 1])
@pytest.mark.parametrize("power", [-1, 0, 1])
def test_numbers_are_apportioned_to_powers_of_frequencies(power, least):
    """Powers that are whole, so that the weights are fractions."""
    (router,) = build(power=power, least=least)
    use_r = row_frequency(router.table, text()).astype(int)
    seen = np.flatnonzero(use_r)
    weights = [Fraction(int(use)) ** power for use in use_r[seen]]
    for k in range(2, 8):
        counts = router.table.count_r(k)[seen].tolist()
        assert is_apportioned(weights, counts, least, 8)
        assert abs(counts @ use_r[seen] / use_r.sum() - k) <= use_r.max() / use_r.sum() / 2
        moved = [*counts[1:], counts[0]]  # negative control
        assert power == 0 or not is_apportioned(weights, moved, least, 8)
    frequent, rare = use_r[seen].argmax(), use_r[seen].argmin()
    counts = router.table.count_r(3)[seen].tolist()
    assert power == 0 or np.sign(counts[frequent] - counts[rare]) == power


def test_power_0_is_hashed_but_for_a_few_ties():
    (router,) = build(power=0)
    for k in range(1, 9):
        assert (router.table.count_r(k) == k).float().mean() > 0.99


@pytest.mark.method
@pytest.mark.parametrize("power", [-0.125, 0.125])
def test_numbers_on_the_training_text_and_on_another(power):
    (router,) = build(replace(MOE, rows=4096, copy_experts=2), ids=text(200_000, 200), vocab=200, power=power)
    check_numbers(router, text(200_000, 200), text(50_000, 200, seed=1))


@pytest.mark.method
@pytest.mark.parametrize("ngram", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_numbers_on_real_text(ngram):
    if "FOREROUTE_DATA" not in os.environ:
        pytest.skip("FOREROUTE_DATA is not set")
    (path,) = (Path(os.environ["FOREROUTE_DATA"]) / "enwik8_prefix").glob("enwik8.first*")
    ids = np.fromfile(path, np.uint8)
    train, held_out = ids[: ids.size * 9 // 10], ids[ids.size * 9 // 10 :]
    (router,) = build(replace(MOE, experts=16, ngram=ngram, rows=65536), ids=train, vocab=256)
    check_numbers(router, train, held_out)


def write(path, numbers):
    np.save(path, numbers)
    return {"counts_file": str(path), "least": 0}


@pytest.mark.method
def test_numbers_of_a_file_are_used_as_they_are_where_their_mean_is_k(tmp_path):
    use_r = row_frequency(HashedRouter.build(MOE, RouterInputs(VOCAB, 5, 1, text()))[0].table, text()).astype(int)
    number_r = np.random.default_rng(1).integers(0, 7, 1000)
    (seen,) = np.nonzero(use_r)
    while gap := int(3 * use_r.sum() - number_r @ use_r):  # change single numbers until the mean is 3
        step = int(np.sign(gap))
        fits = seen[(use_r[seen] <= abs(gap)) & (number_r[seen] + step >= 0) & (number_r[seen] + step <= 6)]
        row = fits[use_r[fits].argmax()]
        number_r[row] += step
    (router,) = build(**write(tmp_path / "numbers.npy", number_r))
    count_r = router.table.count_r(3).numpy()
    assert (count_r[seen] == number_r[seen]).all()
    assert (count_r == number_r).mean() > 0.99  # rows without uses, at the threshold
    for k in (1, 2, 5, 7):
        mean = router.table.count_r(k).numpy() @ use_r / use_r.sum()
        assert abs(mean - k) <= use_r.max() / use_r.sum() / 2
    never = seen[number_r[seen] == 0]
    assert never.size and (router.table.count_r(5).numpy()[never] == 0).all()


def test_numbers_of_another_file_are_not_taken_from_the_cache(tmp_path):
    def first_rE(numbers):
        moe = replace(MOE, options=write(tmp_path / "numbers.npy", numbers))
        inputs = RouterInputs(VOCAB, 5, 1, text(), cache_dir=tmp_path / "cache")
        return ByFrequencyRouter.build(moe, inputs)[0].table.first_rE

    draw = np.random.default_rng(1)
    one, other = draw.integers(0, 9, 1000), draw.integers(0, 9, 1000)
    found = first_rE(one)
    assert torch.equal(first_rE(one), found) and not torch.equal(first_rE(other), found)


def test_two_builds_are_equal():
    first, second = build(number=2), build(number=2)
    for one, other in zip(first, second, strict=True):
        assert all((a == b).all() for a, b in zip(one.identity(), other.identity(), strict=True))


def test_a_certificate_is_exact():
    moe = replace(MOE, copy_experts=2)
    config = Config(
        data=DataConfig(streams=16, segment=40),
        model=ModelConfig(layers=2, width=6),
        moe=moe,
        schedule=ScheduleConfig(k_max=3),
        train=TrainConfig(steps=6, accumulation=2),
        eval=EvalConfig(k=[1]),
    )
    routers, layout, ids = build(moe, number=2, power=-0.5), Layout(config, Placement(4, 2, 2)), text()
    for counts in replay(layout, ids, routers, range(0, 6, 2)):
        sent_ymgPP, count_ymgE = planned_counts(layout, ids, routers, counts.step)
        assert (counts.sent_ymgPP == sent_ymgPP).all() and (counts.count_ymgE == count_ymgE).all()


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        (None, "cannot be read as a file of NumPy's"),
        (np.zeros(7, int), "must be whole numbers of shape [moe.rows=1000]"),
        (np.zeros(1000), "must be whole numbers of shape [moe.rows=1000]"),
        (np.full(1000, -1), "has -1: must be in 0 .. 8"),
        (np.full(1000, 9), "has 9: must be in 0 .. 8"),
    ],
)
def test_files_that_are_refused(tmp_path, numbers, words):
    path = tmp_path / "numbers.npy"
    if numbers is not None:
        np.save(path, numbers)
    with pytest.raises(UserError) as error:
        build(counts_file=str(path))
    assert str(path) in str(error.value) and words in str(error.value) and "\n" not in str(error.value)


def test_rows_that_n_grams_share_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"at least 900, moe\.rows=800"):
        build(replace(MOE, rows=800), **write(tmp_path / "numbers.npy", np.zeros(800, int)))
    with pytest.raises(UserError, match=r"moe\.options\.power=2: must be in -1 \.\. 1"):
        build(power=2)
