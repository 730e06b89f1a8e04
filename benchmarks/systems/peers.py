"""The expert layer as others compute it, for bench_kernels.py and gpu_check/: same routing and weights, by autograd.

    out[t] = sum over t's choices k:  weight[t, k] * (relu(x[t] @ w1[e].T + b1[e]) @ w2[e] + b2[e]),   e = expert[t, k]

Each peer is written in the fastest form that its name allows: index_select instead of brackets, whose backward is three
times as slow, and for loops over experts a parameter per expert, so that no gradient has to be assembled.

Letters: T tokens, D width, E experts, F expert hidden width, K choices per token, N = T * K expert rows, C capacity.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import GradCase
from foreroute.kernels import ExpertWeights

NAMES = (
    "naive_loop",
    "argsort_mm",
    "argsort_mm_planned",
    "padded_bmm",
    "grouped_mm",
    "grouped_mm_planned",
    "deepspeed",
)

# older PyTorch has it under the second name
_grouped_mm: Callable[..., Tensor] = getattr(F, "grouped_mm", None) or torch._grouped_mm


class Shape(NamedTuple):
    """Sizes of a layer."""

    tokens: int
    width: int
    hidden: int
    experts: int
    k: int

    @property
    def rows(self) -> int:
        """Expert rows N."""
        return self.tokens * self.k


@dataclass(frozen=True, slots=True)
class Problem:
    """The input of a layer: tensors, routing and sizes."""

    x_TD: Tensor
    weights: ExpertWeights
    expert_TK: Tensor  # int64
    weight_TK: Tensor  # constants, dtype of x
    cotangent_TD: Tensor

    @property
    def num_experts(self) -> int:
        """Number of experts E."""
        return self.weights.b1_LF.shape[0]

    def cast(self, dtype: torch.dtype) -> "Problem":
        """Return the same problem in another dtype, with parameters of its own."""
        return Problem(
            self.x_TD.detach().to(dtype).requires_grad_(),
            ExpertWeights(*(w.detach().to(dtype).requires_grad_() for w in self.weights if w is not None)),
            self.expert_TK,
            self.weight_TK.to(dtype),
            self.cotangent_TD.to(dtype),
        )


class Expert(NamedTuple):
    """Parameters of one expert."""

    w1_FD: Tensor
    b1_F: Tensor
    w2_FD: Tensor
    b2_D: Tensor


class Order(NamedTuple):
    """Choices sorted by expert."""

    choice_N: Tensor  # which of the flattened choices each expert row is
    source_N: Tensor  # token of each expert row
    inverse_N: Tensor  # expert row of each choice
    expert_N: Tensor  # expert of each expert row
    count_E: Tensor
    offset_E: Tensor  # int32, end of each expert's rows


def case(
    problem: Problem, forward: Callable[[], Tensor], experts: Sequence[Expert] = (), tables: Sequence[Tensor] = ()
) -> GradCase:
    """Make a case of a forward pass that reads the stacked weights or, if given, those of each expert."""
    pieces = zip(*experts, strict=True) if experts else ([w] for w in problem.weights[:4])
    parameters = dict(zip(("w1", "b1", "w2", "b2"), pieces, strict=True))
    return GradCase(forward, problem.x_TD, parameters, problem.cotangent_TD, tables)


def make_problem(shape: Shape, *, skewed: bool = False, device: str = "cpu") -> Problem:
    """Draw a problem in fp64 whose numbers are exact in bf16 too.

    What enters the first product are small multiples of powers of two: its sums are then exact in fp32 in any order,
    and no hidden unit near 0 is active for one implementation and not for another.
    """
    generator = torch.Generator(device).manual_seed(0)
    tokens, width, hidden, experts, k = shape
    kwargs: dict[str, Any] = {"generator": generator, "device": device, "dtype": torch.float32}

    def grid(*size: int, scale: float = 1.0) -> Tensor:
        return (16 * torch.randn(*size, **kwargs)).round().clamp(-64, 64).double() * (scale / 16)

    weight_TK = 0.25 + 0.5 * torch.rand(tokens, k, **kwargs)
    to_one = 2.0 ** -round(width.bit_length() / 2)  # about 1 / sqrt(width)
    weights = ExpertWeights(
        grid(experts, hidden, width, scale=to_one),
        grid(experts, hidden, scale=1 / 16),
        grid(experts, hidden, width, scale=to_one),
        grid(experts, width, scale=1 / 16),
    )
    return Problem(
        grid(tokens, width),
        weights,
        choose(shape, generator, skewed=skewed),
        weight_TK.bfloat16().double(),
        grid(tokens, width),
    )


def choose(shape: Shape, generator: torch.Generator, *, skewed: bool) -> Tensor:
    """Draw random distinct choices; if skewed, every token's first is expert 0."""
    score_TE = torch.rand(shape.tokens, shape.experts, generator=generator, device=generator.device)
    if skewed:
        score_TE[:, 0] = 2.0
    return score_TE.topk(shape.k, dim=1).indices


def separate(weights: ExpertWeights) -> list[Expert]:
    """Copy stacked weights into parameters of each expert."""
    return [
        Expert(*(w[e].detach().clone().requires_grad_() for w in weights[:4] if w is not None))
        for e in range(weights.b1_LF.shape[0])
    ]


def sort_choices(problem: Problem) -> Order:
    """Sort all choices by expert."""
    num_experts, k = problem.num_experts, problem.expert_TK.shape[1]
    flat_N = problem.expert_TK.flatten()
    choice_N = torch.argsort(flat_N, stable=True)
    inverse_N = torch.empty_like(choice_N)
    inverse_N[choice_N] = torch.arange(choice_N.numel(), device=choice_N.device)
    count_E = torch.bincount(flat_N, minlength=num_experts)
    offset_E = count_E.cumsum(0).to(torch.int32)
    return Order(choice_N, choice_N // k, inverse_N, flat_N[choice_N], count_E, offset_E)


def _weighted_sum(y_ND: Tensor, index_N: Tensor, weight_TK: Tensor) -> Tensor:
    """Put rows into the order of tokens and choices, and add up each token's."""
    y_TKD = y_ND.index_select(0, index_N).unflatten(0, weight_TK.shape)
    weighted_TKD: Tensor = y_TKD * weight_TK[..., None]
    return weighted_TKD.sum(1)


def naive_loop(problem: Problem, experts: Sequence[Expert]) -> Tensor:
    """Loop over experts: look for an expert's tokens, run them, add them to the output.

    As Mixtral's layer in Hugging Face transformers does; in fp64 it is the truth that every case is compared with.
    """
    out_TD = torch.zeros_like(problem.x_TD)
    for e, expert in enumerate(experts):
        token_n, choice_n = torch.where(problem.expert_TK == e)
        x_nD = problem.x_TD.index_select(0, token_n)
        hidden_nF = F.linear(x_nD, expert.w1_FD, expert.b1_F).relu()
        y_nD = torch.addmm(expert.b2_D, hidden_nF, expert.w2_FD)
        out_TD.index_add_(0, token_n, y_nD * problem.weight_TK[token_n, choice_n, None])
    return out_TD


def argsort_mm(problem: Problem, experts: Sequence[Expert], order: Order) -> Tensor:
    """Permute all rows into the order of experts, run expert after expert, concatenate.

    Then put the rows back and add up each token's.
    """
    x_ND = problem.x_TD.index_select(0, order.source_N)
    parts = [
        torch.addmm(expert.b2_D, F.linear(x_nD, expert.w1_FD, expert.b1_F).relu(), expert.w2_FD)
        for x_nD, expert in zip(x_ND.split(order.count_E.tolist()), experts, strict=True)
    ]
    return _weighted_sum(torch.cat(parts), order.inverse_N, problem.weight_TK)


def padded_bmm(problem: Problem, order: Order) -> Tensor:
    """Pad every expert's rows to those of the busiest, so that nothing is dropped; two batched products.

    The work grows with the busiest expert.
    """
    w1_EFD, b1_EF, w2_EFD, b2_ED, _ = problem.weights
    capacity = int(order.count_E.max())
    before_E = order.offset_E - order.count_E
    each_N = torch.arange(order.choice_N.numel(), device=order.choice_N.device)
    place_N = order.expert_N * capacity + each_N - before_E[order.expert_N]
    x_ND = problem.x_TD.index_select(0, order.source_N)
    x_CD = x_ND.new_zeros(problem.num_experts * capacity, x_ND.shape[1])
    x_ECD = x_CD.index_copy(0, place_N, x_ND).unflatten(0, (problem.num_experts, capacity))
    hidden_ECF = torch.baddbmm(b1_EF[:, None], x_ECD, w1_EFD.mT).relu()
    y_ECD = torch.baddbmm(b2_ED[:, None], hidden_ECF, w2_EFD)
    return _weighted_sum(y_ECD.flatten(0, 1), place_N[order.inverse_N], problem.weight_TK)


def grouped_mm(problem: Problem, order: Order) -> Tensor:
    """Permute, use torch's grouped products, and add the rows up by index_add.

    Its bias argument is not implemented: biases are added by index.
    """
    x_ND = problem.x_TD.index_select(0, order.source_N)
    y_ND = grouped_products(x_ND, problem.weights, order)
    weight_N = problem.weight_TK.flatten()[order.choice_N]
    return torch.zeros_like(problem.x_TD).index_add(0, order.source_N, y_ND * weight_N[:, None])


def grouped_products(x_ND: Tensor, weights: ExpertWeights, order: Order) -> Tensor:
    """Run permuted rows through their experts by torch's grouped products.

    Nothing is gathered or added up: what is left of grouped_mm when its rows are where they should be.
    """
    w1_EFD, b1_EF, w2_EFD, b2_ED, _ = weights
    z_NF = _grouped_mm(x_ND, w1_EFD.mT, offs=order.offset_E)
    hidden_NF = (z_NF + b1_EF.index_select(0, order.expert_N)).relu()
    y_ND = _grouped_mm(hidden_NF, w2_EFD, offs=order.offset_E)
    return y_ND + b2_ED.index_select(0, order.expert_N)


def permuted(problem: Problem) -> Problem:
    """Make each expert row of a problem a token of its own, sorted by expert, of weight 1."""
    order = sort_choices(problem)
    x_ND, cotangent_ND = (t.detach().index_select(0, order.source_N) for t in (problem.x_TD, problem.cotangent_TD))
    expert_N1 = order.expert_N[:, None]
    weight_N1 = torch.ones_like(expert_N1, dtype=x_ND.dtype)
    return Problem(x_ND, problem.weights, expert_N1, weight_N1, cotangent_ND)


def products_only(problem: Problem) -> GradCase:
    """Make the case of grouped_products for a permuted problem."""
    order = sort_choices(problem)
    return case(problem, lambda: grouped_products(problem.x_TD, problem.weights, order))


class ExpertModule(nn.Module):
    """One expert as a module."""

    def __init__(self, expert: Expert) -> None:
        super().__init__()
        self.w1_FD, self.b1_F, self.w2_FD, self.b2_D = map(nn.Parameter, expert)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.w1_FD, self.b1_F).relu(), self.w2_FD.T, self.b2_D)


def deepspeed(problem: Problem, order: Order) -> GradCase:
    """Build DeepSpeed's MOELayer with every expert on this process and the busiest expert's rows as capacity.

    Its gate is replaced by one that hands out the given routing and costs nothing.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.moe.experts import Experts
    from deepspeed.moe.sharded_moe import MOELayer

    before_E = order.offset_E - order.count_E
    place_TK = order.inverse_N.view_as(problem.expert_TK) - before_E[problem.expert_TK]
    load_loss, capacity = torch.zeros(()), int(order.count_E.max())
    routes = (problem.expert_TK.int(), place_TK.int(), problem.weight_TK.float())
    routes_KT = (route_TK.T.contiguous() for route_TK in routes)
    given = (load_loss, capacity, problem.num_experts, *routes_KT, order.count_E)
    modules = [ExpertModule(expert) for expert in separate(problem.weights)]
    experts = Experts(nn.Identity(), 0, "all")
    experts.deepspeed_experts, experts.num_local_experts = nn.ModuleList(modules), len(modules)
    layer = MOELayer(lambda *_: given, experts, "all", 1, len(modules))
    own = [Expert(m.w1_FD, m.b1_F, m.w2_FD, m.b2_D) for m in modules]
    return case(problem, lambda: layer(problem.x_TD, None), own)


def peers(problem: Problem, names: Sequence[str] = NAMES) -> dict[str, GradCase]:
    """Make the cases of some peers; those named _planned get their choices sorted beforehand, as ours do."""
    order, experts = sort_choices(problem), separate(problem.weights)
    made: dict[str, Callable[[], GradCase]] = {
        "naive_loop": lambda: case(problem, lambda: naive_loop(problem, experts), experts),
        "argsort_mm": lambda: case(problem, lambda: argsort_mm(problem, experts, sort_choices(problem)), experts),
        "argsort_mm_planned": lambda: case(problem, lambda: argsort_mm(problem, experts, order), experts),
        "padded_bmm": lambda: case(problem, lambda: padded_bmm(problem, sort_choices(problem))),
        "grouped_mm": lambda: case(problem, lambda: grouped_mm(problem, sort_choices(problem))),
        "grouped_mm_planned": lambda: case(problem, lambda: grouped_mm(problem, order)),
        "deepspeed": lambda: deepspeed(problem, order),
    }
    return {name: made[name]() for name in names}


def truth(problem: Problem) -> dict[str, Tensor]:
    """Return output and gradients, computed in fp64."""
    exact = problem.cast(torch.float64)
    experts = separate(exact.weights)
    return case(exact, lambda: naive_loop(exact, experts), experts).results()
