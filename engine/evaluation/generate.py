"""Sampling from a trained model: temperature, top-p, memory reused from symbol to symbol, at any k, or at two of them
in contrast.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from foreroute.engine.config import Keys
from foreroute.engine.data.documents import document_positions, ends_at
from foreroute.engine.data.planned_batches import group_batch, plan_batch
from foreroute.engine.data.streams import Batch
from foreroute.engine.errors import require
from foreroute.engine.model.build import RunModel
from foreroute.engine.model.transformer_xl import Memory
from foreroute.engine.nested import map_tensors
from foreroute.engine.parallel.cpu_group import CpuGroup
from foreroute.engine.routing.plans.row_plan import plan_rows


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an id is drawn from the model's distribution."""

    temperature: float  # 0 takes the most probable id
    top_p: float  # from the fewest ids whose probability reaches this (Holtzman et al. 2019, arXiv 1904.09751)
    generator: torch.Generator


@dataclass(frozen=True, slots=True)
class Contrast:
    """A second pass at a smaller k, away from which ids are drawn (SCMoE, Shi et al. 2024, arXiv 2405.14507)."""

    k: int
    beta: float = 0.5  # how far away; 0: not at all
    alpha: float = 0.1  # ids with less than this share of the largest probability are left out


def generate(
    run: RunModel,
    prompt: Sequence[int],
    *,
    k: int,
    length: int,
    sampling: Sampling,
    document_ends: Sequence[int] = (),
    contrast: Contrast | None = None,
) -> Iterator[int]:
    """Return an iterator over `length` sampled ids that continue the prompt, at k active experts.

    Args:
        prompt: ids, the first of which starts a document; an empty prompt starts from a document's end or, where none
            is known, from id 0, as ids before a stream's start do.
        document_ends: ids after which another document starts.

    Raises:
        UserError: keys were shuffled in training, and one symbol at a time has no others to shuffle with.
    """
    keys = run.config.moe.keys
    require(keys is Keys.own, f"moe.keys={keys.name}: a control that cannot generate; only moe.keys=own can")

    def sampled() -> Iterator[int]:
        history = list(prompt) or [*document_ends, 0][:1]
        reader = _Reader(run, k, document_ends)
        weak = None if contrast is None else _Reader(run, contrast.k, document_ends)
        for _ in range(length):
            logits_V = reader.next_logits(history)
            if weak is not None and contrast is not None:
                logits_V = contrasted(logits_V, weak.next_logits(history), contrast)
            chosen = sample(logits_V, sampling)  # the generator is the host's
            history.append(chosen)
            yield chosen

    return sampled()


class _Reader:
    """Reads a growing text at one k, with a memory of its own."""

    def __init__(self, run: RunModel, k: int, document_ends: Sequence[int]) -> None:
        self.run, self.k, self.document_ends = run, k, document_ends
        # one symbol at a time needs a longer memory to see as far as a whole segment does
        self.memory_len = max(run.config.model.memory, run.config.data.segment)
        self.memory: Memory | None = None
        self.start = 0
        run.model.eval()

    @torch.inference_mode()
    def next_logits(self, history: Sequence[int]) -> Tensor:
        """Read what is new of the text; return the logits of the id after it, on the host."""
        config, model, device = self.run.config, self.run.model, self.run.model.u.device
        while self.start < len(history):
            part = list(history[self.start : self.start + config.data.segment])
            left = ([0] * config.context + list(history))[self.start : self.start + config.context]
            batch = _batch(part, left, self.start)
            if self.document_ends:
                starts = np.sort(np.concatenate([ends_at(np.array(history), end) for end in self.document_ends]))
                positions = document_positions(starts, np.array([self.start]), len(part))
                batch = replace(batch, position_BQ=positions)
            planned = plan_batch(
                group_batch([batch]),
                self.k,
                self.run.routers,
                held_out=True,
                reset_memory=config.data.reset_memory,
                table_rows=plan_rows(model.table_keys, [batch], CpuGroup())[0],
            )
            ids_BQ, routing = map_tensors(lambda tensor: tensor.to(device), (planned.batch.ids_BQ, planned.routing))
            hidden_BQD, self.memory = model.hidden(ids_BQ, self.memory, routing, memory_len=self.memory_len)[:2]
            self.start += len(part)
            logits_BQV = model.output_logits(hidden_BQD[:, -1:])
        return logits_BQV[0, -1].cpu()


def contrasted(strong_V: Tensor, weak_V: Tensor, contrast: Contrast) -> Tensor:
    """Return (1 + beta) strong - beta weak, and -inf for ids that are strongly less likely than alpha of the best.

    Example: logits log 0.6, log 0.36, log 0.04, weak ones all equal, and alpha 0.1: the third id is left out.
    """
    contrast_V = (1 + contrast.beta) * strong_V - contrast.beta * weak_V
    least = strong_V.max() + math.log(contrast.alpha) if contrast.alpha else -torch.inf
    return contrast_V.masked_fill(strong_V < least, -torch.inf)


def _batch(ids: list[int], left: list[int], index: int) -> Batch:
    ids_BQ = torch.tensor([ids])
    left_BC = torch.tensor([left], dtype=torch.int64).reshape(1, len(left))
    return Batch(ids_BQ, ids_BQ, left_BC, torch.zeros(1, dtype=torch.int64), index, fresh=False)


def sample(logits_V: Tensor, sampling: Sampling) -> int:
    """Draw one id from logits."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    probability_V = (logits_V.double() / sampling.temperature).softmax(-1)
    sorted_V, order_V = probability_V.sort(descending=True)
    sorted_V[sorted_V.cumsum(0) - sorted_V >= sampling.top_p] = 0  # the first id always stays
    return int(order_V[torch.multinomial(sorted_V, 1, generator=sampling.generator)])
