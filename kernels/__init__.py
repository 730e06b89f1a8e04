"""The operations of an expert layer on tensors, one public function each.

Attention is in ops/relative_attention.py, the loss in ops/linear_cross_entropy.py.

They take tensors and integers: no configuration, no process group, no nn.Module. Every operation has a plain-loop
reference. Import from here: `from foreroute.kernels import moe_ffn, ExpertRows`.
"""

from foreroute.kernels.dropout import Dropout, keep_mask, row_hash, unit_hash
from foreroute.kernels.expert_index import ExpertRows, expert_rows, expert_rows_from_lists
from foreroute.kernels.operands import ExpertWeights
from foreroute.kernels.ops.combine import combine
from foreroute.kernels.ops.expert_ffn import expert_ffn
from foreroute.kernels.ops.moe_ffn import moe_ffn, moe_ffn_backward, moe_ffn_forward
from foreroute.kernels.ops.permute import permute_rows, unpermute_rows

__all__ = [
    "Dropout",
    "ExpertRows",
    "ExpertWeights",
    "combine",
    "expert_ffn",
    "expert_rows",
    "expert_rows_from_lists",
    "keep_mask",
    "moe_ffn",
    "moe_ffn_backward",
    "moe_ffn_forward",
    "permute_rows",
    "row_hash",
    "unit_hash",
    "unpermute_rows",
]
