"""The names of a run's numbers, their units and meanings, and the file that has them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

JSONL = "metrics.jsonl"


WANDB_ID = "wandb_id.txt"  # in the run's folder: the id of its W&B run and the run's name


class Metric(NamedTuple):
    """The unit and meaning of a metric."""

    unit: str
    meaning: str
    axes: tuple[str, ...] = ()  # of its lists: rank, layer, or layer and expert; () is a number


_RANK, _LAYER, _EXPERT = ("rank",), ("layer",), ("layer", "expert")


METRICS: dict[str, Metric] = {
    "loss": Metric("nats/symbol", "training loss without auxiliary losses"),
    "auxiliary_loss": Metric("nats/symbol", "balance, z- or consistency loss, weighted; 0 for fixed routers"),
    "bpc": Metric("bits/symbol", "loss in bits"),
    "valid_loss": Metric("nats/symbol", "loss on the validation split at k_max, now"),
    "valid_bpc": Metric("bits/symbol", "valid_loss in bits, now"),
    "k": Metric("experts", "active experts per token in this step"),
    "active_parameters": Metric("parameters", "that one token uses at the k of this step"),
    "learning_rate": Metric("1", "learning rate of this step"),
    "grad_norm": Metric("1", "global gradient norm before clipping, of this step"),
    "tokens": Metric("symbols", "trained on since the start of the run, over all ranks"),
    "flops": Metric(
        "FLOP",
        "useful arithmetic of training since the start of the run, over all ranks: forward and backward, recomputation"
        " not counted",
    ),
    "tokens_per_second": Metric("symbols/s", "trained on per second, over all ranks"),
    "tokens_per_second_per_rank": Metric("symbols/s", "the same over the number of ranks"),
    "mfu": Metric(
        "1",
        "useful arithmetic per second over the peak of all ranks' devices (of tf32 where kernels.precision says so,"
        " though only experts use it); 0 when the peak is unknown",
    ),
    "step_ms": Metric(
        "ms", "one optimizer step; the parts below too. On a GPU the device's time, waits for the host in it"
    ),
    "processor_ms": Metric(
        "ms",
        "processor time of the thread that trains in step_ms, of rank 0: without waits, and without the time that"
        " other programs have its core",
    ),
    "plan_wait_ms": Metric("ms", "waiting for a batch and its plans"),
    "forward_ms": Metric("ms", "forward passes; on a GPU of its own time, as its parts"),
    "backward_ms": Metric("ms", "backward passes; on a GPU of its own time"),
    "optimizer_ms": Metric("ms", "gradient clipping and update; on a GPU of its own time"),
    "outside_ms": Metric("ms", "step time outside forward, backward and optimizer"),
    "metric_ms": Metric("ms", "time in the code of metrics itself, part of outside_ms"),
    "attention_ms": Metric("ms", "attention, part of forward_ms"),
    "experts_ms": Metric("ms", "expert layers, part of forward_ms"),
    "exchange_exposed_ms": Metric("ms", "exchanging rows while nothing is computed; 0 on one rank"),
    "exchange_hidden_ms": Metric("ms", "exchanging rows while something is computed; 0 on one rank"),
    "own_ms": Metric(
        "ms",
        "forward passes without waiting for other ranks, part of forward_ms (on a GPU of its own time); of rank 0. The"
        " wait of a learned router's global balance counts as own",
    ),
    "data_ms": Metric("ms", "the loader's thread reading and planning one step's batches, beside the step"),
    "slowest_rank": Metric("rank", "the rank with the most own_ms since the last line"),
    "rank_skew": Metric("1", "its own_ms over the median rank's; 1 on one rank"),
    "wire_bytes": Metric("bytes", "sent to other ranks in one step for the experts' sake, over all ranks and layers"),
    "wire_bytes_inside": Metric("bytes", "of wire_bytes, between ranks of one node"),
    "wire_bytes_between": Metric("bytes", "of wire_bytes, between ranks of different nodes"),
    "table_bytes": Metric(
        "bytes",
        "sent to other ranks in one step for n-gram tables, over all ranks: rows, their gradients, and the row"
        " numbers that hosts exchange ahead",
    ),
    "load_max_over_mean": Metric("1", "rows of the busiest expert over the mean, worst layer; 0 when dense"),
    "rank_load_max_over_mean": Metric("1", "expert rows computed by the busiest rank over the mean rank; 0 when dense"),
    "memory_bytes": Metric("bytes", "resident memory of this process now"),
    "peak_memory_bytes": Metric("bytes", "largest resident memory of this process since its start"),
    "device_memory_bytes": Metric("bytes", "of rank 0's GPU in use by tensors now; 0 on a CPU"),
    "peak_device_memory_bytes": Metric("bytes", "largest device_memory_bytes since the start of the process"),
    "rank_own_ms": Metric(
        "ms", "own_ms of each rank, up to the step before this one, on a GPU the one before that", _RANK
    ),
    "rank_plan_wait_ms": Metric("ms", "plan_wait_ms of each rank", _RANK),
    "rank_exchange_exposed_ms": Metric("ms", "exchange_exposed_ms of each rank, likewise", _RANK),
    "rank_memory_bytes": Metric("bytes", "memory_bytes of each rank in this step", _RANK),
    "rank_wire_bytes": Metric("bytes", "wire_bytes that each rank sent in one step", _RANK),
    "link_bytes": Metric(
        "bytes",
        "of rank_wire_bytes, what went to each rank of the sender's expert group; [] on one rank and on more than 16",
        ("rank", "peer"),
    ),
    "rank_rows": Metric("rows", "expert rows computed by each rank in one step, all layers", _RANK),
    "layer_load": Metric("1", "rows of the busiest expert over the mean, in each layer", _LAYER),
    "expert_rows": Metric("rows", "of each expert in one step, over all ranks", _EXPERT),
}
"""Means over the steps since the last line, of rank 0 where ranks differ, unless the meaning says otherwise."""


def read_lines(file: Path, damaged: list[str] | None = None) -> list[dict[str, Any]]:
    """Read the lines of a run's metrics.jsonl, each an object with "step" and metrics by name.

    Args:
        damaged: takes the lines that are no JSON, such as one that is just being written; None: there may be none.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is no JSON.
    """
    found = []
    for line in file.read_text(errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            if damaged is None:
                raise
            damaged.append(line)
    return found


def steps_between(lines: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the steps of each line, those since the line before."""
    steps = [int(line["step"]) for line in lines]
    return [max(step - before, 0) for step, before in zip(steps, [0, *steps], strict=False)]
