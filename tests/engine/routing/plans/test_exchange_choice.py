"""Tokens or gather: the model against numbers worked out by hand, and what must hold at its limits."""

import itertools
import random
from math import comb

import pytest

from foreroute.engine.config import Config, KernelsConfig, MoEConfig, ParallelConfig
from foreroute.engine.config.enums import Backend, ExchangeKind, Precision
from foreroute.engine.errors import UserError
from foreroute.engine.routing.plans.exchange_choice import (
    gather_seconds,
    gathers,
    rank_share,
    tokens_seconds,
    use_gather,
)

AUTO = ParallelConfig(exchange=ExchangeKind.auto, link_gb_per_s=10, message_us=5, memory_gb_per_s=100)
SIZES = {"experts": 16, "ranks": 8, "tokens": 4096, "width": 512, "itemsize": 2}


def test_the_model_by_hand():
    # 4096 x 512 x 2 = 4,194,304 bytes of rows; k = 8: 1 - C(14, 8) / C(16, 8) = 1 - 3003 / 12870 = 0.766667 of the
    # tokens for each of 8 ranks: 25,725,065 routed bytes.
    row_bytes, routed = 4_194_304, 25_725_065
    assert rank_share(16, 8, 8) == pytest.approx(0.7666667, abs=1e-6)
    assert row_bytes * 8 * rank_share(16, 8, 8) == pytest.approx(routed, abs=1)
    # 14 messages of 5 us; 2 x 7/8 of the routed bytes at 10 GB/s; (3 x 25,725,065 + 4,194,304) bytes at 100 GB/s
    assert tokens_seconds(AUTO, 8, row_bytes, routed) == pytest.approx(70e-6 + 4501.886e-6 + 813.695e-6)
    # 6 messages; 14 x 4,194,304 bytes; 8 x 4,194,304 bytes of memory
    assert gather_seconds(AUTO, 8, row_bytes) == pytest.approx(30e-6 + 5872.026e-6 + 335.544e-6)
    assert not use_gather(AUTO, k=8, **SIZES)  # 5.39 ms against 6.24 ms
    assert use_gather(AUTO, k=12, **SIZES)  # 1 - C(14, 12) / C(16, 12) = 0.95: 6.67 ms against 6.24 ms


def test_the_bytes_of_a_row_decide():
    """Gather saves 8 messages, 40 us; a byte of rows costs it 1.48 - 1.26733 = 0.21267 ns more: 188,088 bytes are as
    good."""
    for tokens, gather in ((183, True), (184, False)):  # of 512 x 2 bytes
        assert use_gather(AUTO, k=8, **{**SIZES, "tokens": tokens}) == gather
    for tokens, gather in ((91, True), (92, False)):  # of 512 x 4 bytes
        assert use_gather(AUTO, k=8, **{**SIZES, "tokens": tokens, "itemsize": 4}) == gather


@pytest.mark.parametrize(("experts", "ranks", "k"), [(16, 8, 8), (8, 4, 3), (6, 2, 1), (4, 4, 2)])
def test_the_share_of_a_rank_by_enumeration(experts, ranks, k):
    local = experts // ranks
    subsets = list(itertools.combinations(range(experts), k))
    hit = sum(any(expert < local for expert in subset) for subset in subsets)
    assert len(subsets) == comb(experts, k)
    assert rank_share(experts, ranks, k) == pytest.approx(hit / len(subsets))


def test_limits():
    draw = random.Random(0)
    for _ in range(300):
        ranks = 2 ** draw.randint(1, 7)
        sizes = {
            "experts": ranks * draw.randint(1, 4),
            "ranks": ranks,
            "tokens": draw.randint(1, 9999),
            "width": 64,
            "itemsize": 4,
        }
        parallel = ParallelConfig(
            exchange=ExchangeKind.auto,
            link_gb_per_s=draw.uniform(0.01, 500),
            message_us=draw.uniform(0, 50),
            memory_gb_per_s=draw.uniform(1, 4000),
        )
        chosen = [use_gather(parallel, k=k, **sizes) for k in range(1, sizes["experts"] + 1)]
        assert chosen == sorted(chosen)  # once gather wins it wins for every larger k
        assert chosen[-1]  # all experts: as many bytes, fewer messages, nothing packed
        assert rank_share(sizes["experts"], ranks, sizes["experts"]) == 1
    free = ParallelConfig(exchange=ExchangeKind.auto, message_us=0, memory_gb_per_s=1e9)
    assert not use_gather(free, k=1, **SIZES)  # only bytes count: tokens never sends more
    tiny = {**SIZES, "tokens": 1, "width": 1}
    assert use_gather(AUTO, k=1, **tiny)  # only messages count


@pytest.mark.parametrize("kind", list(ExchangeKind), ids=lambda kind: kind.name)
def test_one_rank_never_gathers_and_a_fixed_choice_is_kept(kind):
    parallel = ParallelConfig(exchange=kind)
    for k in (1, 16):
        assert not use_gather(parallel, k=k, **{**SIZES, "ranks": 1})
        if kind is not ExchangeKind.auto:
            assert use_gather(parallel, k=k, **SIZES) == (kind is ExchangeKind.gather)


@pytest.mark.parametrize(
    ("name", "value"), [("link_gb_per_s", 0.0), ("memory_gb_per_s", -1.0), ("message_us", -0.5), ("chunks", 0)]
)
def test_wrong_constants_are_refused(name, value):
    with pytest.raises(UserError, match=rf"parallel\.{name}={value}: must be"):
        ParallelConfig(**{name: value})


def test_parts_need_a_backend_with_a_backward_pass():
    with pytest.raises(UserError, match=r"parallel\.chunks=4: kernels\.backend=reference has only 1"):
        Config(parallel=ParallelConfig(chunks=4), kernels=KernelsConfig(backend=Backend.reference))


def test_a_dense_run_has_nothing_to_gather():
    """Whatever its k, which nothing reads and which may be above its experts."""
    moe = MoEConfig(router="dense", experts=2)
    assert not gathers(AUTO, moe, 256, Precision.fp32, ranks=2, k=4, tokens=100)
