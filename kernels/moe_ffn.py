"""The expert layer as one operation: gather rows, feed-forward of each expert, weighted sum per input row.

    out[r] = sum over the expert rows n of r:  weight[n] * FFN_e(n)(x[r])
    FFN_e(x) = dropout(act(x @ w1[e].T + b1[e])) @ w2[e] + b2[e],   act = ReLU, or SwiGLU = silu(.) * (x @ w3[e].T)

Two ways to compute it, same inputs, same result up to rounding. `grouped`: each expert multiplies only the rows that
chose it. `masked`: each expert multiplies all rows and rows that did not choose it get weight 0; no gather and no
scatter, so it wins when k is near E. Both walk expert by expert, so that an expert's hidden units stay in the cache
between their two products, and keep only x and the pre-activations for backward.

Letters: R input rows, D width, L experts here, F expert hidden width, N expert rows, n rows of one expert.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dropout import Dropout, keep_mask, row_hash, unit_hash
from kernels.reference import moe_ffn_reference
from kernels.rows import ExpertRows


class ExpertWeights(NamedTuple):
    """Stacked parameters of the local experts; w3 (the gate) only for SwiGLU."""

    w1_LFD: Tensor
    b1_LF: Tensor
    w2_LFD: Tensor  # second product, stored with the hidden unit first: y = a @ w2
    b2_LD: Tensor
    w3_LFD: Tensor | None = None


def moe_ffn(
    x_RD: Tensor,
    weight_N: Tensor,
    weights: ExpertWeights,
    rows: ExpertRows,
    *,
    dropout: Dropout | None = None,
    masked: bool = False,
    backend: str = "cpu",
) -> Tensor:
    """Apply each row's experts and add up their weighted outputs.

    Args:
        x_RD: input rows, fp32, bf16 or fp64.
        weight_N: fp32 mixing weight of each expert row; gets a gradient only if it asks for one.
        weights: stacked expert parameters, dtype of x.
        rows: which row each expert row reads (see kernels/rows.py).
        dropout: stateless dropout on the hidden units; None for none.
        masked: multiply all rows by all experts (see above) instead of only the chosen ones.
        backend: "cpu" or "reference" (plain loops).

    Returns:
        out_RD, dtype of x. A row without expert rows gives zeros.

    Raises:
        ValueError: shapes or dtypes disagree, or the backend is unknown.
    """
    _check(x_RD, weight_N, weights, rows)
    if backend == "reference":
        return moe_ffn_reference(x_RD, weight_N, weights, rows, dropout)
    if backend != "cpu":
        raise ValueError(f"backend={backend!r}: must be 'cpu' or 'reference'")
    function = _Masked if masked else _Grouped
    out_RD: Tensor = function.apply(x_RD, weight_N, *weights, rows, dropout)
    return out_RD


def _check(x_RD: Tensor, weight_N: Tensor, weights: ExpertWeights, rows: ExpertRows) -> None:
    num_experts, width_F, width_D = weights.w1_LFD.shape
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "x_RD": (x_RD, (rows.num_inputs, width_D)),
        "weight_N": (weight_N, (rows.num_rows,)),
        "b1_LF": (weights.b1_LF, (num_experts, width_F)),
        "w2_LFD": (weights.w2_LFD, (num_experts, width_F, width_D)),
        "b2_LD": (weights.b2_LD, (num_experts, width_D)),
        "rows.offset_L": (rows.offset_L, (num_experts,)),
    }
    w3_LFD = weights.w3_LFD
    if w3_LFD is not None:
        expected["w3_LFD"] = (w3_LFD, (num_experts, width_F, width_D))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: must be {shape}")
    for name, (tensor, _) in expected.items():
        if tensor.dtype != x_RD.dtype and name not in ("weight_N", "rows.offset_L"):
            raise ValueError(f"{name} is {tensor.dtype}: must be {x_RD.dtype} like x_RD")


def _act(z_nF: Tensor, u_nF: Tensor | None) -> Tensor:
    return torch.relu(z_nF) if u_nF is None else F.silu(z_nF).mul_(u_nF)


def _act_backward(da_nF: Tensor, z_nF: Tensor, u_nF: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradient at the pre-activation and at the gate input."""
    if u_nF is None:
        return torch.ops.aten.threshold_backward(da_nF, z_nF, 0), None
    return torch.ops.aten.silu_backward(da_nF * u_nF, z_nF), F.silu(z_nF).mul_(da_nF)


class _Saved(NamedTuple):
    """What backward needs; z_MF (and u_MF for SwiGLU) are the pre-activations of all experts, expert-major."""

    x_RD: Tensor
    weight_N: Tensor
    w1_LFD: Tensor
    b1_LF: Tensor
    w2_LFD: Tensor
    b2_LD: Tensor
    w3_LFD: Tensor | None
    z_MF: Tensor
    u_MF: Tensor | None


def _forward_expert(
    saved: _Saved, expert: int, span: slice, x_nD: Tensor, keep_nF: Tensor | None, scale: float
) -> Tensor:
    """Unweighted output [n, D] of one expert; leaves its pre-activations in saved.z_MF[span]."""
    z_nF = torch.addmm(saved.b1_LF[expert], x_nD, saved.w1_LFD[expert].T, out=saved.z_MF[span])
    u_nF = None
    if saved.w3_LFD is not None and saved.u_MF is not None:
        u_nF = torch.mm(x_nD, saved.w3_LFD[expert].T, out=saved.u_MF[span])
    a_nF = _act(z_nF, u_nF)
    if keep_nF is not None:
        a_nF.mul_(keep_nF)
    return torch.addmm(saved.b2_LD[expert], a_nF, saved.w2_LFD[expert], alpha=scale)


class _Gradients:
    """Gradient buffers of the parameters, filled expert by expert."""

    def __init__(self, saved: _Saved) -> None:
        self.w1_LFD = torch.empty_like(saved.w1_LFD)
        self.b1_LF = torch.empty_like(saved.b1_LF)
        self.w2_LFD = torch.empty_like(saved.w2_LFD)
        self.b2_LD = torch.empty_like(saved.b2_LD)
        self.w3_LFD = None if saved.w3_LFD is None else torch.empty_like(saved.w3_LFD)

    def expert(
        self,
        saved: _Saved,
        expert: int,
        span: slice,
        x_nD: Tensor,
        dout_nD: Tensor,
        weight_n: Tensor,
        keep_nF: Tensor | None,
        scale: float,
        dweight_n: Tensor | None,
    ) -> Tensor:
        """Write one expert's parameter gradients (and dweight_n if given) and return its dx [n, D].

        The mixing weight is multiplied into the D-wide output gradient, not into the F-wide hidden units. Its own
        gradient <dout, FFN(x)> is rewritten as <dout @ w2.T, a> + <dout, b2>, so that FFN(x) is not saved.
        """
        z_nF, w2_FD = saved.z_MF[span], saved.w2_LFD[expert]
        u_nF = None if saved.u_MF is None else saved.u_MF[span]
        a_nF = _act(z_nF, u_nF)
        if keep_nF is not None:
            a_nF.mul_(keep_nF)
        weighted_nD = dout_nD * weight_n[:, None].to(dout_nD.dtype)
        if dweight_n is not None:
            hidden_n = ((dout_nD @ w2_FD.T) * a_nF).sum(1, dtype=dweight_n.dtype)
            torch.add(dout_nD @ saved.b2_LD[expert], hidden_n, alpha=scale, out=dweight_n)
        da_nF = weighted_nD @ w2_FD.T
        if scale != 1.0:
            da_nF.mul_(scale)
        torch.addmm(w2_FD, a_nF.T, weighted_nD, beta=0, alpha=scale, out=self.w2_LFD[expert])
        torch.sum(weighted_nD, 0, out=self.b2_LD[expert])
        if keep_nF is not None:
            da_nF.mul_(keep_nF)
        dz_nF, du_nF = _act_backward(da_nF, z_nF, u_nF)
        torch.mm(dz_nF.T, x_nD, out=self.w1_LFD[expert])
        torch.sum(dz_nF, 0, out=self.b1_LF[expert])
        dx_nD = dz_nF @ saved.w1_LFD[expert]
        if du_nF is not None and saved.w3_LFD is not None and self.w3_LFD is not None:
            torch.mm(du_nF.T, x_nD, out=self.w3_LFD[expert])
            dx_nD.addmm_(du_nF, saved.w3_LFD[expert])
        return dx_nD

    def all(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Return the buffers in the order of ExpertWeights."""
        return self.w1_LFD, self.b1_LF, self.w2_LFD, self.b2_LD, self.w3_LFD


def _spans(rows: ExpertRows) -> Iterator[tuple[int, slice]]:
    start = 0
    for expert, count in enumerate(rows.counts()):
        yield expert, slice(start, start + count)
        start += count


class _Masks:
    """Dropout masks of one operation, made one expert at a time."""

    def __init__(self, dropout: Dropout | None, width: int, device: torch.device) -> None:
        self.dropout = dropout
        self.scale = 1.0 if dropout is None else dropout.scale
        self.unit_F = None if dropout is None else unit_hash(width, device)

    def keep(self, expert: int, source_n: Tensor | None) -> Tensor | None:
        """Mask [n, F] of an expert for the given input rows (None: all of them)."""
        if self.dropout is None or self.unit_F is None:
            return None
        token_R = self.dropout.token_R
        token_n = token_R if source_n is None else token_R.index_select(0, source_n)
        return keep_mask(row_hash(self.dropout, token_n, expert), self.unit_F, self.dropout.rate)


def _pre_activations(count: int, b1_LF: Tensor, gated: bool) -> tuple[Tensor, Tensor | None]:
    z_MF = b1_LF.new_empty(count, b1_LF.shape[1])
    return z_MF, torch.empty_like(z_MF) if gated else None


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, weight_N: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
                w3: Tensor | None, rows: ExpertRows, dropout: Dropout | None) -> Tensor:  # fmt: skip
        z_MF, u_MF = _pre_activations(rows.num_rows, b1, w3 is not None)
        saved = _Saved(x_RD, weight_N, w1, b1, w2, b2, w3, z_MF, u_MF)
        masks = _Masks(dropout, w1.shape[1], x_RD.device)
        y_ND = x_RD.new_empty(rows.num_rows, x_RD.shape[1])
        for expert, span in _spans(rows):
            source_n = rows.source_N[span]
            x_nD = x_RD.index_select(0, source_n)
            y_nD = _forward_expert(
                saved, expert, span, x_nD, masks.keep(expert, source_n), masks.scale
            )
            torch.mul(y_nD, weight_N[span, None].to(y_nD.dtype), out=y_ND[span])
        ctx.save_for_backward(*saved)
        ctx.rows, ctx.dropout = rows, dropout
        return F.embedding_bag(rows.slot_N, y_ND, rows.slot_offset_R, mode="sum")

    @staticmethod
    def backward(ctx: Any, dout_RD: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        saved, rows = _Saved(*ctx.saved_tensors), ctx.rows
        masks = _Masks(ctx.dropout, saved.w1_LFD.shape[1], dout_RD.device)
        gradients = _Gradients(saved)
        dweight_N = torch.empty_like(saved.weight_N) if ctx.needs_input_grad[1] else None
        dx_ND = saved.x_RD.new_empty(rows.num_rows, saved.x_RD.shape[1])
        for expert, span in _spans(rows):
            source_n = rows.source_N[span]
            dweight_n = None if dweight_N is None else dweight_N[span]
            dx_ND[span] = gradients.expert(
                saved, expert, span, saved.x_RD.index_select(0, source_n), dout_RD.index_select(0, source_n),
                saved.weight_N[span], masks.keep(expert, source_n), masks.scale, dweight_n,
            )  # fmt: skip
        dx_RD = F.embedding_bag(rows.slot_N, dx_ND, rows.slot_offset_R, mode="sum")
        return dx_RD, dweight_N, *gradients.all(), None, None


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, weight_N: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
                w3: Tensor | None, rows: ExpertRows, dropout: Dropout | None) -> Tensor:  # fmt: skip
        num_experts, num_inputs = w1.shape[0], x_RD.shape[0]
        weight_LR = weight_N.new_zeros(num_experts, num_inputs)
        weight_LR[_expert_of(rows), rows.source_N] = weight_N
        z_MF, u_MF = _pre_activations(num_experts * num_inputs, b1, w3 is not None)
        saved = _Saved(x_RD, weight_LR, w1, b1, w2, b2, w3, z_MF, u_MF)
        masks = _Masks(dropout, w1.shape[1], x_RD.device)
        out_RD = _accumulator(x_RD)
        for expert in range(num_experts):
            span = slice(expert * num_inputs, (expert + 1) * num_inputs)
            y_RD = _forward_expert(saved, expert, span, x_RD, masks.keep(expert, None), masks.scale)
            out_RD.addcmul_(y_RD, weight_LR[expert, :, None].to(y_RD.dtype))
        ctx.save_for_backward(*saved)
        ctx.rows, ctx.dropout = rows, dropout
        return out_RD.to(x_RD.dtype)

    @staticmethod
    def backward(ctx: Any, dout_RD: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        saved, rows = _Saved(*ctx.saved_tensors), ctx.rows
        masks = _Masks(ctx.dropout, saved.w1_LFD.shape[1], dout_RD.device)
        gradients = _Gradients(saved)
        dweight_LR = torch.empty_like(saved.weight_N) if ctx.needs_input_grad[1] else None
        dx_RD = _accumulator(saved.x_RD)
        num_inputs = dx_RD.shape[0]
        for expert in range(rows.num_experts):
            span = slice(expert * num_inputs, (expert + 1) * num_inputs)
            dweight_R = None if dweight_LR is None else dweight_LR[expert]
            dx_RD += gradients.expert(
                saved, expert, span, saved.x_RD, dout_RD, saved.weight_N[expert],
                masks.keep(expert, None), masks.scale, dweight_R,
            )  # fmt: skip
        dweight_N = None if dweight_LR is None else dweight_LR[_expert_of(rows), rows.source_N]
        return dx_RD.to(dout_RD.dtype), dweight_N, *gradients.all(), None, None


def _accumulator(like: Tensor) -> Tensor:
    """Zeros in at least fp32, to add up experts in."""
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))


def _expert_of(rows: ExpertRows) -> Tensor:
    """Local expert of each expert row, [N]."""
    counts = torch.diff(rows.offset_L, prepend=rows.offset_L.new_zeros(1))
    return torch.arange(rows.num_experts, device=counts.device).repeat_interleave(counts)
