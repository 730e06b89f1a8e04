"""Sampling from a trained model: temperature, top-p, memory reused from symbol to symbol, at any k."""

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


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an id is drawn from the model's distribution."""

    temperature: float  # 0 takes the most probable id
    top_p: float  # from the fewest ids whose probability reaches this (Holtzman et al. 2019, arXiv 1904.09751)
    generator: torch.Generator


def generate(
    run: RunModel, prompt: Sequence[int], *, k: int, length: int, sampling: Sampling, document_ends: Sequence[int] = ()
) -> Iterator[int]:
    """Return an iterator over `length` sampled ids that continue the prompt, at k active experts.

    Args:
        prompt: ids, the first of which starts a document; an empty prompt starts from a document's end or, where none
            is known, from id 0, as ids before a stream's start do.
        document_ends: ids after which another document starts.

    Raises:
        UserError: keys were shuffled in training, and one symbol at a time has no others to shuffle with.
    """
    config, model = run.config, run.model
    require(
        config.moe.keys is Keys.own,
        f"moe.keys={config.moe.keys.name}: a control that cannot generate; only moe.keys=own can",
    )

    def sampled() -> Iterator[int]:
        context, device = config.context, model.u.device
        # one symbol at a time needs a longer memory to see as far as a whole segment does
        memory_len = max(config.model.memory, config.data.segment)
        history = list(prompt) or [*document_ends, 0][:1]
        memory: Memory | None = None
        start = 0
        model.eval()
        for _ in range(length):
            with torch.inference_mode():
                while start < len(history):
                    part = history[start : start + config.data.segment]
                    left = ([0] * context + history)[start : start + context]
                    batch = _batch(part, left, start)
                    if document_ends:
                        starts = np.sort(np.concatenate([ends_at(np.array(history), end) for end in document_ends]))
                        batch = replace(batch, position_BQ=document_positions(starts, np.array([start]), len(part)))
                    planned = plan_batch(
                        group_batch([batch]),
                        k,
                        run.routers,
                        held_out=True,
                        input_keys=model.input_keys,
                        reset_memory=config.data.reset_memory,
                    )
                    ids_BQ, routing = map_tensors(
                        lambda tensor: tensor.to(device), (planned.batch.ids_BQ, planned.routing)
                    )
                    hidden_BQD, memory = model.hidden(ids_BQ, memory, routing, memory_len=memory_len)[:2]
                    start += len(part)
                    logits_BQV = model.output_logits(hidden_BQD[:, -1:])
                chosen = sample(logits_BQV[0, -1].cpu(), sampling)  # the generator is the host's
            history.append(chosen)
            yield chosen

    return sampled()


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
