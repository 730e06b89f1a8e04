"""How tensors move fast: the operations of an expert layer, one public function each (attention: relative_attention.py).

Knows tensors and integers only: no configuration, no process group, no nn.Module. Every operation has a plain-loop
reference beside it. Import from here: `from kernels import moe_ffn, ExpertRows`.
"""

from kernels.combine import combine
from kernels.dropout import Dropout, keep_mask, row_hash, unit_hash
from kernels.expert_ffn import expert_ffn
from kernels.moe_ffn import moe_ffn, moe_ffn_backward, moe_ffn_forward
from kernels.operands import ExpertWeights
from kernels.permute_rows import permute_rows, unpermute_rows
from kernels.rows import ExpertRows, expert_rows, expert_rows_from_lists

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
