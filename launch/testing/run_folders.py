"""Make run folders for tests of reports, with every file and metric that a run writes, and made-up numbers."""

import json
from dataclasses import replace
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np

from foreroute.engine.config import Config, MoEConfig, ScheduleConfig, TrainConfig
from foreroute.launch.start.config_files import write_config

RANKS, LAYERS, EXPERTS, STREAM_SYMBOLS = 4, 2, 8, 1024


def write_run(
    folder: Path,
    *,
    lines: int = 40,
    log_every: int = 10,
    state: str = "complete",
    seed: int = 0,
    ranks: int = RANKS,
    layers: int = LAYERS,
    experts: int = EXPERTS,
    lr: float = 1e-3,
    certificate: bool = True,
) -> Path:
    """Write the folder of a run that never ran; k grows from 1 to 4."""
    folder.mkdir(parents=True)
    steps = lines * log_every
    base = Config(train=TrainConfig(name=folder.name, steps=steps, log_every=log_every))
    config = replace(
        base,
        moe=MoEConfig(experts=experts),
        schedule=ScheduleConfig(k_max=4),
        optim=replace(base.optim, lr=lr),
        eval=replace(base.eval, k=[1, 2, 4, 8]),
    )
    write_config(config, folder / "config.yaml")
    random = np.random.default_rng(seed)
    with (folder / "metrics.jsonl").open("w") as file:
        for line in range(1, lines + 1):
            found = _line(
                random, line, steps=line * log_every, part=line / lines, ranks=ranks, layers=layers, experts=experts
            )
            file.write(json.dumps(found) + "\n")
            if line % 10 == 0:
                valid = {name: found[name] for name in ("step", "tokens", "flops", "k")}
                file.write(json.dumps({**valid, "valid_loss": found["loss"], "valid_bpc": found["bpc"] + 0.05}) + "\n")
    flops = {str(k): 1e6 * (1 + k) for k in (1, 2, 4, 8)}
    facts = {
        "parameters": 3_444_992,
        "active_parameters": {str(k): 400_000 * k for k in (1, 2, 4, 8)},
        "flops_per_symbol": flops,
        "symbols_per_step": STREAM_SYMBOLS,
        "steps": steps,
        "ranks": ranks,
        "expert_ranks": ranks,
        "nodes": 2,
        "router": "hashed",
        "corpus": {"name": "stdlib", "symbols": 11_354_162, "sha256": "9787ad39" * 8, "tokens": "bytes"},
        "device": "cpu",
        "peak_flops": 1e11,
        "peak_source": "measured",
        "code": {"version": "0.1.0", "commit": "907538d" + 33 * "0", "changed": False},
        "versions": {"python": "3.11.7", "torch": "2.13.0", "triton": "3.7.0", "deepspeed": "0.19.8"},
        "started": ["2026-11-25T16:00:00"],
        "certificate": {"path": "certificates/run", "wire_bytes_by_k": {str(k): 2e6 * k for k in (1, 2, 3, 4)}}
        if certificate
        else None,
    }
    _write(folder / "facts.json", facts)
    _write(folder / "state.json", {"state": state, "step": steps})
    if state == "complete":
        _write(folder / "summary.json", _summary(seed))
    return folder


def _write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value))


def _summary(seed: int) -> dict[str, Any]:
    bpc = {"1": 2.68, "2": 2.38, "4": 2.27, "8": 2.31}
    return {
        "bpc": {k: value + 0.01 * seed for k, value in bpc.items()},
        "tokens_per_second": 7000.0,
        "training_seconds": 180.0,
        "outside_fraction": 0.01,
        "peak_memory_bytes": 900_000_000,
        "order2_bpc": 2.7,
        "order3_bpc": 2.15,
        "bzip2_bpc": 1.57,
        "steps": 400,
        "split": "test",
        "symbols": 567_709,
        "parameters": 3_444_992,
        "corpus_sha256": "9787ad39" * 8,
    }


def _line(
    random: np.random.Generator, line: int, *, steps: int, part: float, ranks: int, layers: int, experts: int
) -> dict[str, Any]:
    k = 1 + min(3, int(4 * part))
    loss = 1.5 + 3 * exp(-8 * part) + 0.03 * random.standard_normal()
    rows = STREAM_SYMBOLS * k / experts * random.uniform(0.7, 1.4, (layers, experts))
    own = 40 + 10 * k + 3 * random.random(ranks)
    parts = {
        "forward_ms": 50 + 10 * k,
        "attention_ms": 15.0,
        "experts_ms": 10.0 * k,
        "backward_ms": 60 + 18 * k,
        "optimizer_ms": 12.0,
        "outside_ms": 2.0,
    }
    step_ms = sum(parts[name] for name in ("forward_ms", "backward_ms", "optimizer_ms", "outside_ms"))
    wire = 2e6 * k
    of_ranks = (wire / ranks * random.uniform(0.9, 1.1, ranks)).tolist()
    return {
        "step": steps,
        "loss": loss,
        "auxiliary_loss": 0.0,
        "bpc": loss / log(2),
        "k": k,
        "learning_rate": 1e-3 * (1 - part) + 1e-5,
        "grad_norm": 1 + random.exponential(),
        "tokens": steps * STREAM_SYMBOLS,
        "flops": 3e9 * steps * k,
        **parts,
        "step_ms": step_ms,
        "processor_ms": 0.9 * step_ms,
        "tokens_per_second": 1e3 * STREAM_SYMBOLS / step_ms,
        "tokens_per_second_per_rank": 1e3 * STREAM_SYMBOLS / step_ms / ranks,
        "plan_wait_ms": 0.05,
        "data_ms": 3.0,
        "metric_ms": 0.2,
        "exchange_exposed_ms": 4.0,
        "exchange_hidden_ms": 2.0,
        "own_ms": own[0],
        "slowest_rank": int(own.argmax()),
        "rank_skew": own.max() / float(np.median(own)),
        "wire_bytes": wire,
        "wire_bytes_inside": 0.25 * wire,
        "wire_bytes_between": 0.75 * wire,
        "table_bytes": 0.1 * wire,
        "active_parameters": 400_000 * k,
        "load_max_over_mean": float((rows.max(1) / rows.mean(1)).max()),
        "rank_load_max_over_mean": 1.05,
        "memory_bytes": 8e8 + 1e6 * line,
        "peak_memory_bytes": 8.5e8 + 1e6 * line,
        "device_memory_bytes": 0,
        "peak_device_memory_bytes": 0,
        "mfu": 0.21,
        "rank_own_ms": own.tolist(),
        "rank_plan_wait_ms": [0.05] * ranks,
        "rank_exchange_exposed_ms": [4.0] * ranks,
        "rank_memory_bytes": [8e8 + 1e7 * rank for rank in range(ranks)],
        "rank_wire_bytes": of_ranks,
        "link_bytes": [
            [0.0 if to == rank else wire / ranks / max(1, ranks - 1) for to in range(ranks)] for rank in range(ranks)
        ]
        if 1 < ranks <= 16
        else [],
        "rank_rows": [STREAM_SYMBOLS * k * layers / ranks] * ranks,
        "layer_load": (rows.max(1) / rows.mean(1)).tolist(),
        "expert_rows": rows.tolist(),
    }
