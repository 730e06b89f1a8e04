"""Statistics of a trained model's experts and routes: likeness of the experts, evenness of the load, change of routes.

Everything is measured on the first symbols of a split, read as one stream, by the evaluation's own forward passes
(engine/evaluation/held_out.py) on one rank. launch/analyse.py runs it on the checkpoints of a run.

Letters: T tokens, D width, E experts, F expert hidden width, N expert rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foreroute.engine.config import Backend, Split
from foreroute.engine.evaluation.held_out import evaluate
from foreroute.engine.model.build import RunModel
from foreroute.engine.moe.experts import Experts
from foreroute.engine.routing.plan import Plan
from foreroute.kernels import ExpertWeights, expert_ffn, expert_rows

COMPARED_TOKENS = 1024
"""Tokens, at most, for which the outputs of all experts are compared."""


@dataclass(frozen=True, slots=True)
class LayerSeen:
    """Inputs of one expert layer and their routes, token by token."""

    experts: Experts
    hidden_TD: Tensor  # what the experts read
    weight_TE: Tensor  # fp32 mixing weights; 0 where an expert was not chosen
    chosen_TE: Tensor  # bool


@dataclass(frozen=True, slots=True)
class RouteStatistics:
    """How the tokens of a text were routed at one k; means over the layers."""

    load_max_over_mean: float  # rows of the busiest expert over the mean; 1 is even
    load_entropy: float  # of the experts' shares of the rows, over its maximum log E; 1 is even
    weight_entropy: float  # of a token's mixing weights in nats, mean over tokens; at most log k


def observe(run: RunModel, *, k: int, symbols: int, split: Split = Split.test) -> list[LayerSeen]:
    """Run the first symbols of a split at k active experts; return what each expert layer was given (nothing if dense).

    Args:
        symbols: whole segments of them are read, and at least one.
    """
    config = run.config
    segment = config.eval.segment or config.data.segment
    whole = max(1, min(symbols, len(run.corpus.split(split))) // segment) * segment
    one_stream = replace(config, eval=replace(config.eval, streams=1, max_symbols=whole))
    found: dict[Experts, list[LayerSeen]] = {}
    hooks = []
    for module in run.model.modules():
        if isinstance(module, Experts):
            seen = found.setdefault(module, [])
            hooks.append(module.register_forward_pre_hook(partial(_note, seen), with_kwargs=True))
    try:
        evaluate(replace(run, config=one_stream), split=split, k=k)
    finally:
        for hook in hooks:
            hook.remove()
    return [
        LayerSeen(
            experts,
            torch.cat([seen.hidden_TD for seen in passes]),
            torch.cat([seen.weight_TE for seen in passes]),
            torch.cat([seen.chosen_TE for seen in passes]),
        )
        for experts, passes in found.items()
    ]


def output_similarity(seen: LayerSeen, tokens: int = COMPARED_TOKENS) -> float:
    """Compute the mean cosine similarity of two experts' outputs for the same input, over pairs of experts and tokens.

    All experts compute all tokens, chosen or not. 1 means that all experts point the same way (collapse); an
    output of zeros counts as similar to nothing.

    Args:
        tokens: the first so many are taken.
    """
    return _mean_of_pairs(outputs_of_all(seen, tokens))


def outputs_of_all(seen: LayerSeen, tokens: int = COMPARED_TOKENS) -> Tensor:
    """Compute the outputs of all experts for the first tokens, chosen or not [E, T, D]."""
    x_TD = seen.hidden_TD[:tokens].contiguous()
    experts = seen.experts
    num_experts = experts.w1.shape[0]
    everyone_TE = torch.arange(num_experts).expand(len(x_TD), num_experts)
    rows, _ = expert_rows(everyone_TE, num_experts)
    weights = ExpertWeights(experts.w1, experts.b1, experts.w2, experts.b2, experts.w3)
    with torch.inference_mode():
        act = experts.activation.function
        y_ND = expert_ffn(x_TD, weights, rows, activation=act, backend=Backend.cpu.value)
        return y_ND.view(num_experts, len(x_TD), -1)


def weight_similarity(experts: Experts) -> float:
    """Compute the mean cosine similarity of two experts' flattened parameters, over all pairs of experts.

    Hidden units can be permuted without changing what an expert computes, so a value near 0 does not show that two
    experts compute different things. A value far from 0 shows that they share more than they began with.
    """
    values = (experts.w1, experts.b1, experts.w2, experts.b2, experts.w3)
    flat_EN = torch.cat([value.detach().flatten(1).float() for value in values if value is not None], dim=1)
    return _mean_of_pairs(flat_EN[:, None])


def route_statistics(seen: Sequence[LayerSeen]) -> RouteStatistics:
    """Measure how evenly the experts are used, and how unequal a token's mixing weights are."""
    loads = [layer.chosen_TE.sum(dim=0).double() for layer in seen]
    return RouteStatistics(
        load_max_over_mean=_mean([(rows_E.max() / rows_E.mean()).item() for rows_E in loads]),
        load_entropy=_mean(
            [_entropy(rows_E / rows_E.sum()).item() / max(math.log(len(rows_E)), 1e-9) for rows_E in loads]
        ),
        weight_entropy=_mean([_entropy(layer.weight_TE.double()).mean().item() for layer in seen]),
    )


def routing_change(before: Sequence[LayerSeen], after: Sequence[LayerSeen]) -> float:
    """Return the share of tokens whose set of active experts differs, mean over layers; both saw the same text at the
    same k."""
    pairs = zip(before, after, strict=True)
    return _mean([(a.chosen_TE != b.chosen_TE).any(dim=1).double().mean().item() for a, b in pairs])


def _note(seen: list[LayerSeen], experts: nn.Module, inputs: tuple[object, ...], named: dict[str, Any]) -> None:
    """Keep the inputs and routes of one call of a layer's experts. On one rank received rows are tokens."""
    rows_RD, plan = inputs[:2]
    assert isinstance(experts, Experts) and isinstance(rows_RD, Tensor) and isinstance(plan, Plan)
    (chunk,) = plan.chunks
    weight_N = chunk.weight_N if named["weight_N"] is None else named["weight_N"]
    assert weight_N is not None
    expert_N, token_N = chunk.rows.expert_N(), chunk.rows.source_N.long()
    weight_TE = torch.zeros(len(rows_RD), experts.w1.shape[0])
    chosen_TE = torch.zeros_like(weight_TE, dtype=torch.bool)
    weight_TE[token_N, expert_N] = weight_N.detach().float()
    chosen_TE[token_N, expert_N] = True
    seen.append(LayerSeen(experts, rows_RD.detach(), weight_TE, chosen_TE))


def _mean_of_pairs(value_ETD: Tensor) -> float:
    """Average over pairs of different E, and over T, the cosine of the angle between their last dims."""
    count, tokens = value_ETD.shape[:2]
    if count < 2:
        return math.nan
    unit_ETD = F.normalize(value_ETD.double(), dim=2)
    sum_TD = unit_ETD.sum(dim=0)
    # the squared length of the sum is the sum over all ordered pairs, each with itself included
    itself = unit_ETD.square().sum()
    return ((sum_TD.square().sum() - itself) / (count * (count - 1) * tokens)).item()


def _entropy(share_E: Tensor) -> Tensor:
    """Compute the entropy in nats over the last dim."""
    nats_E: Tensor = torch.special.entr(share_E)
    return nats_E.sum(dim=-1)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
