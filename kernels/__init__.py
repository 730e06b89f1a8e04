"""How tensors move fast: the operations of an expert layer, one public function each (attention:
relative_attention.py).

Knows tensors and integers only: no configuration, no process group, no nn.Module. Every operation has a plain-loop
reference beside it. Import from here: `from kernels import moe_ffn, ExpertRows`.
"""

from foreroute.kernels.combine import combine
from foreroute.kernels.dropout import Dropout, keep_mask, row_hash, unit_hash
from foreroute.kernels.expert_ffn import expert_ffn
from foreroute.kernels.expert_rows import ExpertRows, expert_rows, expert_rows_from_lists
from foreroute.kernels.moe_ffn import moe_ffn, moe_ffn_backward, moe_ffn_forward
from foreroute.kernels.operands import ExpertWeights
from foreroute.kernels.permute_rows import permute_rows, unpermute_rows

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
