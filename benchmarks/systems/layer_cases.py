"""The expert layer as kernels.moe_ffn computes it, and the dense feed-forward of equal FLOPs that ratios refer to.

Letters: see benchmarks/systems/peers.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import GradCase
from benchmarks.systems import peers
from benchmarks.systems.peers import Problem
from foreroute.kernels import expert_rows, moe_ffn

LOADS = ("uniform", "skewed")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "tf32": torch.float32}
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2, "tf32": 5e-3}  # of a relative norm


def dense(
    rows: int, width: int, hidden: int, dtype: torch.dtype, *, bias: bool = True, device: str = "cpu"
) -> GradCase:
    """Make the plain feed-forward that ratios refer to."""

    def leaf(*size: int) -> Tensor:
        numbers: Tensor = torch.randn(*size, device=device) / size[-1] ** 0.5
        return numbers.to(dtype).requires_grad_()

    x_ND, w1_FD, w2_DF = leaf(rows, width), leaf(hidden, width), leaf(width, hidden)
    b1_F, b2_D = (leaf(hidden), leaf(width)) if bias else (None, None)
    named = {"w1": w1_FD, "b1": b1_F, "w2": w2_DF, "b2": b2_D}

    def forward() -> Tensor:
        return F.linear(F.linear(x_ND, w1_FD, b1_F).relu(), w2_DF, b2_D)

    parameters = {name: [tensor] for name, tensor in named.items() if tensor is not None}
    return GradCase(forward, x_ND, parameters, torch.randn_like(x_ND))


def ours(
    problem: Problem, mode: str, *, masked: bool = False, backend: str = "cpu", precision: str = "ieee"
) -> GradCase:
    """Make a case of kernels.moe_ffn."""
    rows, choice_N = expert_rows(problem.expert_TK, problem.num_experts)
    weight_N = problem.weight_TK.flatten()[choice_N].float()

    def forward() -> Tensor:
        return moe_ffn(
            problem.x_TD,
            weight_N,
            problem.weights,
            rows,
            masked=masked,
            mode=mode,
            backend=backend,
            precision=precision,
        )

    return peers.case(problem, forward, tables=(*rows.tensors(), weight_N))
