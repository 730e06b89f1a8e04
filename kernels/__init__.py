"""How tensors move fast: the operations of an expert layer and of relative attention, one public function each.

Knows tensors and integers only: no configuration, no process group, no nn.Module. Every operation has a plain-loop
reference beside it. Import from here: `from kernels import moe_ffn, ExpertRows`.
"""

from kernels.dropout import Dropout, keep_mask
from kernels.moe_ffn import ExpertWeights, moe_ffn
from kernels.rows import ExpertRows, expert_rows

__all__ = ["Dropout", "ExpertRows", "ExpertWeights", "expert_rows", "keep_mask", "moe_ffn"]
