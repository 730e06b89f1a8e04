"""Held-out bits per symbol at a given number of active experts.

Every symbol of the split counts exactly once and the result does not depend on the number of evaluation streams
(engine/data/streams.py, EvalShares), but for routes that are drawn: those depend on stream and segment, and are the
same each time. Used during training, by launch/evaluate.py and at the end of a run.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from foreroute.engine.config import Split
from foreroute.engine.data.device_copy import Delivery, receive
from foreroute.engine.data.planned_batches import group_batch, plan_batch
from foreroute.engine.data.streams import Batch, EvalShares, eval_batches, warm_symbols
from foreroute.engine.model.build import RunModel
from foreroute.engine.model.transformer_xl import Memory
from foreroute.engine.parallel.world import World
from foreroute.engine.routing.planned_router import check_use
from foreroute.engine.routing.plans.exchange_choice import gathers
from foreroute.engine.routing.plans.row_plan import plan_rows

ProgressReporter = Callable[[str, int, int], None]
"""Told of a stage of an evaluation by its name, the parts that are done, and all its parts; first with 0 done."""


def no_progress(stage: str, done: int, total: int) -> None:
    """Report no progress."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Result of one pass over a split."""

    bpc: float  # bits per symbol
    symbols: int  # counted symbols
    seconds: float
    bits_per_byte: float | None = None  # of the source, by the whole split's bytes per symbol; None: the source is ids

    @property
    def nats(self) -> float:
        """Mean loss in nats."""
        return self.bpc * math.log(2)

    @property
    def perplexity(self) -> float:
        """Perplexity of a symbol."""
        return float(2**self.bpc)


def evaluate(
    run: RunModel,
    *,
    split: Split,
    k: int,
    progress: Callable[[int, int], None] | None = None,
    world: World | None = None,
    max_symbols: int = 0,
    after_pass: Callable[[Batch, Tensor], None] | None = None,
) -> Evaluation:
    """Measure the split at k active experts.

    Args:
        progress: called with (segments done, segments in all), first with 0 done; may raise to leave, on all ranks
            alike.
        world: the ranks, which share the streams; every rank gets the whole result.
        max_symbols: only the first so many of the split; 0 means config.eval.max_symbols, which 0 means all.
        after_pass: called after each forward pass with this rank's batch and the positions that count, bool [B, Q].

    Raises:
        UserError: the routers have no routes for the split, or for k.
    """
    config, corpus, model = run.config, run.corpus, run.model
    check_use(run.routers, split, k)
    world = world or World()
    start = time.perf_counter()
    ids = corpus.split(split)
    ids = ids[: max_symbols or config.eval.max_symbols or None]
    memory_len = config.model.memory if config.eval.memory is None else config.eval.memory
    segment = config.eval.segment or config.data.segment
    warm = warm_symbols(config.model.layers, memory_len, segment)
    shares = EvalShares(len(ids), config.eval.streams, segment, warm)
    ranks, delivery = world.mesh.ep_ranks, Delivery(world.device)
    nats, symbols = 0.0, 0
    memory: Memory | None = None
    was_training = model.training
    model.eval()
    if progress is not None:
        progress(0, shares.num_segments)
    with torch.inference_mode():
        cut = eval_batches(ids, corpus.previous_id(split), shares, config.context, corpus.document_starts(split))
        for whole, whole_counted_BQ in cut:
            world.watchdog.gets_on()
            parts = [_share(whole, whole_counted_BQ, rank, world.mesh.world) for rank in ranks]
            batch, counted_BQ = parts[world.mesh.ep_rank]
            group = group_batch([part for part, _ in parts], world.mesh.ep_rank)
            gather = gathers(
                config.parallel,
                config.moe,
                config.model.width,
                config.train.precision,
                ranks=world.mesh.ep_size,
                k=k,
                tokens=batch.ids_BQ.numel(),
            )
            planned = plan_batch(
                group,
                k,
                run.routers,
                gather=gather,
                split=split,
                held_out=True,
                reset_memory=config.data.reset_memory,
                cutoffs=config.model.cutoffs,
                table_rows=plan_rows(model.table_keys, [batch], world.cpu_group)[0],
            )
            batch, counted_BQ, routing = receive(*delivery.send((batch, counted_BQ, planned.routing)))
            output = model(
                batch.ids_BQ,
                batch.targets_BQ,
                memory,
                routing,
                memory_len=memory_len,
                clamp_len=config.eval.clamp_len,
                same_length=config.eval.same_length,
            )
            memory = output.memory
            if after_pass is not None:
                after_pass(batch, counted_BQ)
            nats += output.nll_BQ[counted_BQ].double().sum().item()
            symbols += int(counted_BQ.sum())
            if progress is not None:
                progress(batch.index + 1, shares.num_segments)
    model.train(was_training)
    total = world.sum(torch.tensor([nats, symbols], dtype=torch.float64))
    nats, symbols = total[0].item(), int(total[1])
    bpc = nats / symbols / math.log(2)
    return Evaluation(bpc, symbols, time.perf_counter() - start, corpus.bits_per_byte(split, bpc))


def _share(whole: Batch, counted_BQ: Tensor, rank: int, ranks: int) -> tuple[Batch, Tensor]:
    """Take a rank's streams of a batch; where they do not divide, the last ranks run some twice that do not count."""
    streams = whole.ids_BQ.shape[0]
    size = -(-streams // ranks)
    row_B = torch.arange(rank * size, (rank + 1) * size)
    real_B = row_B < streams
    row_B = row_B.clamp(max=streams - 1)
    part = replace(
        whole,
        ids_BQ=whole.ids_BQ[row_B],
        targets_BQ=whole.targets_BQ[row_B],
        left_BC=whole.left_BC[row_B],
        stream_B=whole.stream_B[row_B],
        position_BQ=None if whole.position_BQ is None else whole.position_BQ[row_B],
        place_B=None if whole.place_B is None else whole.place_B[row_B],
    )
    return part, counted_BQ[row_B] & real_B[:, None]


def slimming_curve(
    run: RunModel, world: World | None = None, progress: ProgressReporter = no_progress
) -> dict[str, Evaluation]:
    """Evaluate eval.split at every k of eval.k; a dense model has one result, called "dense"."""
    config = run.config
    asked = {"dense": config.moe.experts} if config.moe.dense else {str(k): k for k in config.eval.k}
    return {
        name: evaluate(
            run,
            split=config.eval.split,
            k=k,
            world=world,
            progress=partial(progress, name if name == "dense" else f"k = {name}"),
        )
        for name, k in asked.items()
    }
