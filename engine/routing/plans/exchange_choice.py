"""`parallel.exchange=auto`: tokens or gather for a k, by modelled time from constants of the configuration.

A pure function of the configuration and of sizes, so that loader, exchange and certificate agree and a resumed run
decides as before: nothing is measured here.

Letters: T tokens of a rank, D width, E experts, L = E / P experts of a rank, K active experts, P ranks of the group.
"""

from math import ceil, comb, log2

import torch

from foreroute.engine.config import MoEConfig, ParallelConfig
from foreroute.engine.config.enums import ExchangeKind, Precision, WireFormat


def use_gather(
    parallel: ParallelConfig, *, experts: int, ranks: int, k: int, tokens: int, width: int, itemsize: int
) -> bool:
    """Return whether the layers of a run gather at this k; never on one rank.

    Args:
        tokens: of one rank in one micro-batch (T).
        itemsize: bytes of a number on the wire.
    """
    if ranks == 1 or parallel.exchange is ExchangeKind.tokens:
        return False
    if parallel.exchange is ExchangeKind.gather:
        return True
    row_bytes = tokens * width * itemsize
    routed = row_bytes * ranks * rank_share(experts, ranks, min(k, experts))
    return gather_seconds(parallel, ranks, row_bytes) < tokens_seconds(parallel, ranks, row_bytes, routed)


def gathers(
    parallel: ParallelConfig, moe: MoEConfig, width: int, precision: Precision, *, ranks: int, k: int, tokens: int
) -> bool:
    """Return whether the layers of a run gather at this k; as use_gather. Dense ones never do."""
    if moe.dense:  # k may be above moe.experts
        return False
    itemsize = wire_itemsize(parallel, precision)
    return use_gather(parallel, experts=moe.experts, ranks=ranks, k=k, tokens=tokens, width=width, itemsize=itemsize)


def wire_itemsize(parallel: ParallelConfig, precision: Precision) -> int:
    """Return the bytes of a number on the wire."""
    return wire_dtype(parallel, torch.bfloat16 if precision is Precision.bf16 else torch.float32).itemsize


def wire_dtype(parallel: ParallelConfig, model: torch.dtype) -> torch.dtype:
    """Return the number format in which the rows of a model in this format travel."""
    formats = {WireFormat.fp32: torch.float32, WireFormat.bf16: torch.bfloat16}
    return formats.get(parallel.wire, model)


def rank_share(experts: int, ranks: int, k: int) -> float:
    """Return the share of tokens that need a given rank, 1 - C(E - L, K) / C(E, K), if experts are chosen at random.

    Example: 16 experts on 8 ranks and k = 8: 1 - 3003 / 12870 = 0.767; so 5.4 of 7 other ranks get a row of a token.
    """
    return 1 - comb(experts - experts // ranks, k) / comb(experts, k)


def tokens_seconds(parallel: ParallelConfig, ranks: int, row_bytes: float, routed_bytes: float) -> float:
    """Model one layer's forward exchange by `tokens`, of this rank; backward takes as long.

        2 (P - 1) messages, as each of two all-to-alls sends one to each other rank
        + 2 (P - 1) / P x routed bytes through the link
        + memory: rows are read and written when packed, and read and added up into T rows when they are back

    Args:
        row_bytes: of all local tokens, T x D x item bytes.
        routed_bytes: of the rows to all ranks, this one included, between row_bytes / P and P x row_bytes.
    """
    return (
        2 * (ranks - 1) * parallel.message_us * 1e-6
        + 2 * (ranks - 1) / ranks * routed_bytes / (parallel.link_gb_per_s * 1e9)
        + (3 * routed_bytes + row_bytes) / (parallel.memory_gb_per_s * 1e9)
    )


def gather_seconds(parallel: ParallelConfig, ranks: int, row_bytes: float) -> float:
    """Model one layer's forward exchange by `gather`, of this rank; backward takes as long.

    2 ceil(log2 P) messages, as an all-gather by doubling sends them, and a reduce-scatter by halving
    + 2 (P - 1) x row bytes through the link
    + memory: the reduce-scatter reads P - 1 times T rows and adds them up into T rows; nothing is packed
    """
    return (
        2 * ceil(log2(ranks)) * parallel.message_us * 1e-6
        + 2 * (ranks - 1) * row_bytes / (parallel.link_gb_per_s * 1e9)
        + ranks * row_bytes / (parallel.memory_gb_per_s * 1e9)
    )
