"""The truth for tests: each operation as plain loops in fp64, differentiated by autograd. Slow, and obviously right."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.dropout import Dropout, keep_mask, row_hash, unit_hash
from kernels.rows import ExpertRows

if TYPE_CHECKING:
    from kernels.moe_ffn import ExpertWeights


def moe_ffn_reference(
    x_RD: Tensor,
    weight_N: Tensor,
    weights: "ExpertWeights",
    rows: ExpertRows,
    dropout: Dropout | None = None,
) -> Tensor:
    """Apply kernels.moe_ffn one input row and one expert at a time, in fp64; returns the dtype of x."""
    x, weight = x_RD.double(), weight_N.double()
    w1, b1, w2, b2 = (tensor.double() for tensor in weights[:4])
    w3 = None if weights.w3_LFD is None else weights.w3_LFD.double()
    expert_of_row = [e for e, count in enumerate(rows.counts()) for _ in range(count)]
    starts = [*rows.slot_offset_R.tolist(), rows.num_rows]
    out = []
    for r in range(rows.num_inputs):
        total = torch.zeros(x.shape[1], dtype=torch.float64)
        for n in rows.slot_N[starts[r] : starts[r + 1]].tolist():
            e = expert_of_row[n]
            z = w1[e] @ x[r] + b1[e]
            hidden = torch.relu(z) if w3 is None else z * torch.sigmoid(z) * (w3[e] @ x[r])
            if dropout is not None:
                row = row_hash(dropout, dropout.token_R[r : r + 1], e)
                keep = keep_mask(row, unit_hash(hidden.numel()), dropout.rate)[0]
                hidden = hidden * keep * dropout.scale
            total = total + weight[n] * (hidden @ w2[e] + b2[e])
        out.append(total)
    return torch.stack(out).to(x_RD.dtype) if out else x_RD.clone()
