"""Cases for tests of the expert layer: random operands of a given shape, a run with all gradients, relative errors.

Letters: T tokens, D width, F expert hidden width, L experts, K active experts, N = T * K expert rows.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foreroute.kernels.expert_index import ExpertRows, expert_rows
from foreroute.kernels.operands import ExpertWeights


class Case(NamedTuple):
    """Operands of an expert layer in fp64."""

    x_TD: Tensor
    weight_N: Tensor
    weights: ExpertWeights
    rows: ExpertRows

    def rounded(self, dtype: torch.dtype) -> "Case":
        """Return the operands after a round trip through dtype; mixing weights through fp32."""
        weights = [None if w is None else w.to(dtype).double() for w in self.weights]
        x_TD, weight_N = self.x_TD.to(dtype).double(), self.weight_N.float().double()
        return Case(x_TD, weight_N, ExpertWeights._make(weights), self.rows)


def make_case(
    shape: tuple[int, int, int, int, int], *, gated: bool = False, only_expert: int | None = None, seed: int = 0
) -> Case:
    """Draw operands of shape (T, D, F, L, K).

    Args:
        only_expert: the first choice of every token, for skewed loads.
    """
    tokens, width, hidden, experts, active = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    scores_TL = normal(tokens, experts)
    if only_expert is not None:
        scores_TL[:, only_expert] += 100
    rows, _ = expert_rows(scores_TL.topk(active, 1).indices, experts)
    weights = ExpertWeights(
        normal(experts, hidden, width),
        normal(experts, hidden),
        normal(experts, hidden, width),
        normal(experts, width),
        normal(experts, hidden, width) if gated else None,
    )
    return Case(normal(tokens, width), normal(tokens * active).abs(), weights, rows)


def padded(rows: ExpertRows, more_rows: int, more_inputs: int = 0) -> ExpertRows:
    """Pad expert rows and token rows; kernels/expert_index.py defines the form of padding."""
    longer = rows.padded(rows.num_rows + more_rows)
    end = rows.slot_offset_R.new_full((more_inputs,), longer.num_rows)
    return replace(longer, slot_offset_R=torch.cat((longer.slot_offset_R, end)))


def run_with_gradients(
    function: Callable[..., Tensor], inputs: dict[str, Tensor | None], *, constant: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Call function(**inputs), run backward from a random cotangent, and return "out" and each input's gradient.

    Args:
        constant: names of inputs without a gradient.
    """
    leaves = {
        name: None if value is None else value.detach().clone().requires_grad_(name not in constant)
        for name, value in inputs.items()
    }
    out = function(**leaves)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    out.backward(cotangent.to(out.device, out.dtype))
    result = {"out": out.detach()}
    for name, leaf in leaves.items():
        if leaf is not None and name not in constant:
            result[f"d_{name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return result


def layer_inputs(case: Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor | None]:
    """Return the tensors of a case by name, converted to dtype; mixing weights are at least fp32."""
    wide = torch.promote_types(dtype, torch.float32)
    names = ("w1", "b1", "w2", "b2", "w3")
    return {
        "x": case.x_TD.to(device, dtype),
        "weight": case.weight_N.to(device, wide),
        **{n: None if w is None else w.to(device, dtype) for n, w in zip(names, case.weights, strict=True)},
    }


def run_layer(
    function: Callable[..., Tensor],
    case: Case,
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    dweight: bool = True,
    **options: Any,
) -> dict[str, Tensor]:
    """Run moe_ffn, or a function with the same arguments, on a case; see run_with_gradients."""
    rows = ExpertRows(*(index.to(device) for index in case.rows.tensors()))

    def call(x: Tensor, weight: Tensor, **weights: Any) -> Tensor:
        return function(x, weight, ExpertWeights(*weights.values()), rows, **options)

    constant = () if dweight else ("weight",)
    return run_with_gradients(call, layer_inputs(case, dtype, device), constant=constant)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Compute ||got - want|| / ||want|| in fp64, on the common device if there is one; a NaN counts as infinite."""
    if got.device != want.device:
        got, want = got.cpu(), want.cpu()
    want = want.double()
    error = (got.double() - want).norm() / want.norm().clamp(min=1e-30)
    return float(error) if torch.isfinite(error) else float("inf")


def worst_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest relative error and the name of its tensor.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    if got.keys() != want.keys():
        raise ValueError(f"got {', '.join(got)}: want {', '.join(want)}")
    for name, value in want.items():
        if got[name].shape != value.shape:
            raise ValueError(f"{name} has shape {tuple(got[name].shape)}: want {tuple(value.shape)}")
    return max((relative_error(got[name], value), name) for name, value in want.items())
