"""Sampling from a trained model: temperature, top-p, memory reused from symbol to symbol, at any k."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from engine.data import Batch
from engine.loader import plan_batch
from engine.model import Memory, Routing, TransformerXL
from engine.moe.routers import HashedRouter


def generate(
    model: TransformerXL,
    routers: Sequence[HashedRouter] | None,
    prompt: Sequence[int],
    *,
    k: int,
    length: int,
    temperature: float,
    top_p: float,
    segment: int,
    context: int,
    num_experts: int,
    generator: torch.Generator,
) -> Iterator[int]:
    """Yield `length` sampled ids that continue the prompt.

    Args:
        prompt: ids; an empty prompt starts from id 0, as ids before a stream's start do.
        temperature: 0 takes the most probable id.
        top_p: sample from the fewest ids whose probability reaches this (Holtzman et al. 2019, arXiv 1904.09751).
        segment: symbols of the prompt per forward pass.
        context: ids left of a symbol that the router's n-grams need.
    """
    history = list(prompt) or [0]
    memory: Memory | None = None
    start = 0
    model.eval()
    for _ in range(length):
        with torch.inference_mode():
            while start < len(history):
                part = history[start : start + segment]
                left = ([0] * context + history)[start : start + context]
                planned = plan_batch(_batch(part, left), k, routers, num_experts)
                logits_BQV, memory = model.logits(
                    planned.batch.ids_BQ, memory, Routing(k, planned.plans)
                )[:2]
                start += len(part)
            chosen = sample(logits_BQV[0, -1], temperature, top_p, generator)
        history.append(chosen)
        yield chosen


def _batch(ids: list[int], left: list[int]) -> Batch:
    ids_BQ = torch.tensor([ids])
    left_BC = torch.tensor([left], dtype=torch.int64).reshape(1, len(left))
    return Batch(ids_BQ, ids_BQ, left_BC, torch.zeros(1, dtype=torch.int64), index=0, fresh=False)


def sample(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Draw one id; see generate."""
    if temperature == 0:
        return int(logits_V.argmax())
    probability_V = (logits_V.double() / temperature).softmax(-1)
    sorted_V, order_V = probability_V.sort(descending=True)
    sorted_V[sorted_V.cumsum(0) - sorted_V >= top_p] = 0  # the first id always stays
    return int(order_V[torch.multinomial(sorted_V, 1, generator=generator)])
