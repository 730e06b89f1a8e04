"""How the vectors of a token's rows enter a layer: added, through a gate and a short convolution, or as attention's
values.

An entry gets the vectors of all heads, side by side, and the layer's input. It does not know how they arrived. Some
need vectors of earlier positions too. What an entry keeps of a segment is a part of the model's memory, as the layer's
input is (engine/model/transformer_xl.py): detached, and handed in again with the next segment. So a text gives the same
result wherever it is cut into segments.

Letters: B streams, Q segment length, m positions of memory, S = m + Q, D model width, H heads, W width of a row,
X = H * W, I heads x head width of attention.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EntryOutput(NamedTuple):
    """Result of an entry."""

    x_BQD: Tensor  # the layer's input with what the rows add
    value_BSI: Tensor | None = None  # to be added to attention's values, of memory and segment
    kept: Tensor | None = None  # of earlier positions, for the next segment, [B, positions, any]; detached


class Added(nn.Module):
    """x + A e, of a token's vectors e; A is 1 where they are as wide as the model."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.project = nn.Identity() if inputs == width else nn.Linear(inputs, width, bias=False)

    def forward(
        self, row_BQHW: Tensor, x_BQD: Tensor, kept: Tensor | None, *, memory: int, position_BQ: Tensor | None = None
    ) -> EntryOutput:
        """Add the vectors to x."""
        return EntryOutput(x_BQD + self.project(row_BQHW.flatten(2)))


class IntoValues(nn.Module):
    """V e is added to attention's values, for the positions of memory too; V is 1 where e is as wide as they are.

    As value embeddings of modded-nanogpt and nanochat, without their gates. Memory keeps e, so V is the present one.
    """

    def __init__(self, inputs: int, inner: int) -> None:
        super().__init__()
        self.project = nn.Identity() if inputs == inner else nn.Linear(inputs, inner, bias=False)

    def forward(
        self, row_BQHW: Tensor, x_BQD: Tensor, kept: Tensor | None, *, memory: int, position_BQ: Tensor | None = None
    ) -> EntryOutput:
        """Map the vectors of memory and segment; x stays as it is.

        Args:
            kept: vectors of the positions in attention's memory, [B, m, X]; None: there are none.
            memory: positions that attention's memory will hold at most.
        """
        row_BSX = row_BQHW.flatten(2)
        if kept is not None:
            row_BSX = torch.cat((kept, row_BSX), dim=1)
        newest_BmX = row_BSX[:, max(0, row_BSX.shape[1] - memory) :].detach()
        return EntryOutput(x_BQD, self.project(row_BSX), newest_BmX)


@dataclass(frozen=True, slots=True)
class GateForm:
    """In what two published gates differ."""

    bias: bool  # of the two maps
    eps: float | None  # of the norms of key and x; None: that of the dtype
    convolution_eps: float  # of the convolution's norm


ENGRAM = GateForm(bias=True, eps=None, convolution_eps=1e-5)
PER_LAYER = GateForm(bias=False, eps=1e-6, convolution_eps=1e-6)  # qwen4_exp; its norms' gains are stored less 1


class Gated(nn.Module):
    """Engram's gate and short convolution (arXiv 2601.07372, engram_demo_v1.py), with one stream of hidden states.

        key = W_k e, value = W_v e
        s = <RMSNorm(key), RMSNorm(x)> / sqrt(D);  v = sigmoid(sign(s) sqrt(max(|s|, 1e-6))) value
        x + v + SiLU(depthwise causal convolution of RMSNorm(v)), 4 taps, each `dilation` after the other

    The convolution's weights are zero at first. At the start of a text it sees zeros. Memory keeps RMSNorm(v).
    """

    def __init__(self, inputs: int, width: int, *, dilation: int, form: GateForm = ENGRAM, taps: int = 4) -> None:
        """Make the gate.

        Args:
            dilation: ids of the longest n-grams, as published.
        """
        super().__init__()
        self.key = nn.Linear(inputs, width, bias=form.bias)
        self.value = nn.Linear(inputs, width, bias=form.bias)
        self.key_norm = nn.RMSNorm(width, eps=form.eps)
        self.x_norm = nn.RMSNorm(width, eps=form.eps)
        self.convolution_norm = nn.RMSNorm(width, eps=form.convolution_eps)
        self.convolution = nn.Parameter(torch.zeros(width, taps))  # the last tap is of the position itself
        self.distances = tuple(dilation * back for back in reversed(range(taps)))

    def forward(
        self, row_BQHW: Tensor, x_BQD: Tensor, kept: Tensor | None, *, memory: int, position_BQ: Tensor | None = None
    ) -> EntryOutput:
        """Add gated vectors to x.

        Args:
            kept: RMSNorm(v) of as many positions before the segment as the convolution reaches; None: zeros.
            position_BQ: ids of the same document before each id, where the convolution stops at documents.
        """
        row_BQX = row_BQHW.flatten(2)
        key_BQD, value_BQD = self.key_norm(self.key(row_BQX)), self.value(row_BQX)
        s_BQ1 = (key_BQD * self.x_norm(x_BQD)).sum(dim=-1, keepdim=True) * x_BQD.shape[-1] ** -0.5
        gate_BQ1 = torch.sigmoid(s_BQ1.abs().clamp_min(1e-6).sqrt() * s_BQ1.sign())
        v_BQD = gate_BQ1 * value_BQD
        reach, own_BQD = self.distances[0], self.convolution_norm(v_BQD)
        before = own_BQD.new_zeros(own_BQD.shape[0], reach, own_BQD.shape[2]) if kept is None else kept
        both = torch.cat((before, own_BQD), dim=1)
        mixed_BQD = F.silu(self._convolve(both, position_BQ))
        return EntryOutput(x_BQD + v_BQD + mixed_BQD, None, both[:, both.shape[1] - reach :].detach())

    def _convolve(self, both: Tensor, position_BQ: Tensor | None) -> Tensor:
        """Convolve the segment at the end of `both`, before which are as many positions as the convolution reaches."""
        reach, parts = self.distances[0], list[Tensor]()
        for weight_D, distance in zip(self.convolution.T, self.distances, strict=True):
            part_BQD = both[:, reach - distance : both.shape[1] - distance]
            if position_BQ is not None:
                part_BQD = part_BQD * (position_BQ >= distance)[..., None]
            parts.append(weight_D * part_BQD)
        return torch.stack(parts).sum(dim=0)


Entry = Added | IntoValues | Gated
