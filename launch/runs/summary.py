"""The results of a run: summary.json, two plots, and a table for the console; rank 0 makes them.

The slimming curve comes from launch/train.py, the totals of training from metrics.jsonl, and the results of counting
models on the same text from engine/evaluation/ngram_baselines.py.
"""

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from foreroute.engine.config import Split
from foreroute.engine.data.corpus import PreparedCorpus
from foreroute.engine.data.tokens.byte_values import ByteVocab
from foreroute.engine.errors import RunFailed
from foreroute.engine.evaluation.held_out import Evaluation, ProgressReporter, no_progress
from foreroute.engine.evaluation.ngram_baselines import bzip2_bpc, order_n_bpc
from foreroute.engine.metrics.host_memory import peak_memory_bytes
from foreroute.engine.metrics.names import JSONL, read_lines, steps_between
from foreroute.engine.train.trainer import Trainer
from foreroute.launch.page.words import byte_text, count_text
from foreroute.launch.runs.folder import SUMMARY, RunFolder, write_json
from foreroute.launch.runs.plots import BASELINES, plot_loss, plot_slimming
from foreroute.launch.start.console import clock, table

COUNTED_PER_SYMBOL, COUNTED_AT_LEAST = 100, 16_000_000
"""Training symbols that counting models are fitted on, at most, where eval.max_symbols is set: seconds of a long
corpus."""
_CHUNK = 1 << 22  # symbols turned into text at a time
_LAST_LINE = "flops", "peak_device_memory_bytes"  # of metrics.jsonl, for the summary


def summarise(
    run: RunFolder, trainer: Trainer, curve: Mapping[str, Evaluation], progress: ProgressReporter
) -> dict[str, Any]:
    """Write summary.json and the plots; returns the summary.

    Raises:
        RunFailed: they cannot be written.
    """
    config, corpus, split = trainer.config, trainer.corpus, trainer.config.eval.split
    start = time.perf_counter()
    baselines = counting_baselines(corpus, split, config.eval.max_symbols, progress)
    counting_seconds = time.perf_counter() - start
    bpc = {name: found.bpc for name, found in curve.items()}
    summary: dict[str, Any] = {
        "bpc": bpc,
        "bits_per_byte": {name: found.bits_per_byte for name, found in curve.items()},
        "perplexity": {name: found.perplexity for name, found in curve.items()},
        **training_totals(run.path / JSONL),
        "evaluation_seconds": sum(found.seconds for found in curve.values()) + counting_seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        **baselines,
        "steps": trainer.step,
        "split": split.name,
        "symbols": next(iter(curve.values())).symbols,
        "parameters": trainer.parameters,
        "corpus_sha256": corpus.sha256,
        "vocab_sha256": corpus.vocab.fingerprint,
    }
    lines = {label: baselines[key] for label, key in BASELINES.items() if key in baselines and label != "order 2"}
    try:
        plot_loss(run.path / JSONL, run.path / "loss.png")
        plot_slimming(bpc, lines, run.path / "slimming.png")
        write_json(run.path / SUMMARY, summary)
    except OSError as error:
        raise RunFailed(f"cannot write the results into {run.path}: {error}") from error
    return summary


def final_numbers(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return a summary's numbers for W&B's table of runs: test_bpc/k4 and the like, and evaluation_seconds."""
    split = summary["split"]
    return {f"{split}_bpc/{f'k{name}' if name.isdigit() else name}": bpc for name, bpc in summary["bpc"].items()} | {
        "evaluation_seconds": summary["evaluation_seconds"]
    }


def training_totals(metrics: Path) -> dict[str, float]:
    """Add up a run's logged steps, over all its processes: speed, time, and the share outside the model's own work.

    FLOPs and the GPU's memory are there when the last line has them.
    """
    rows = [row for row in read_lines(metrics) if "step_ms" in row]
    steps = steps_between(rows)
    total_ms = sum(count * row["step_ms"] for count, row in zip(steps, rows, strict=True))
    outside_ms = sum(count * row["outside_ms"] for count, row in zip(steps, rows, strict=True))
    known = {name: rows[-1][name] for name in _LAST_LINE if rows[-1].get(name)}
    return {
        "tokens_per_second": 1e3 * rows[-1]["tokens"] / total_ms,
        "training_seconds": total_ms / 1e3,
        "outside_fraction": outside_ms / total_ms,
        **known,
    }


def counting_baselines(
    corpus: PreparedCorpus, split: Split, max_symbols: int, progress: ProgressReporter = no_progress
) -> dict[str, float]:
    """Compute bits per symbol of counting models fitted on the training split, and of bzip2, on the same held-out text.

    The result is empty where symbols are no bytes.
    Where max_symbols shortens the fit as well, counted_symbols is the number of its training symbols.
    """
    if not isinstance(corpus.vocab, ByteVocab):
        return {}
    held_out = corpus.split(split)[: max_symbols or None]
    train_ids, size = corpus.split(Split.train), corpus.vocab.size
    most = max(COUNTED_PER_SYMBOL * max_symbols, COUNTED_AT_LEAST)
    counted_ids = train_ids[:most] if max_symbols else train_ids
    found = {
        f"order{n}_bpc": order_n_bpc(counted_ids, held_out, n, size, partial(progress, f"order {n}")) for n in (2, 3)
    }
    progress("bzip2 -9", 0, 1)
    starts = range(0, len(held_out), _CHUNK)
    found["bzip2_bpc"] = bzip2_bpc(corpus.vocab.decode(held_out[start : start + _CHUNK]) for start in starts)
    progress("bzip2 -9", 1, 1)
    if len(counted_ids) < len(train_ids):
        found["counted_symbols"] = len(counted_ids)
    return found


def result_table(summary: Mapping[str, Any]) -> str:
    """Lay out held-out bpc at each k, that of counting in a table of its own, and the cost of training."""
    best = min(summary["bpc"].values())

    def row(label: str, bpc: float) -> list[str]:
        return [label, f"{bpc:.3f}", f"{100 * (bpc / best - 1):+.1f}%"]

    heads = [f"{summary['split']} split", "bpc", "to best"]
    rows = [row(f"k = {name}" if name.isdigit() else name, bpc) for name, bpc in summary["bpc"].items()]
    by_byte = summary.get("bits_per_byte", {})
    if by_byte and by_byte != summary["bpc"] and None not in by_byte.values():
        heads.append("bits/byte")
        rows = [[*known, f"{bits:.3f}"] for known, bits in zip(rows, by_byte.values(), strict=True)]
    lines = [table(heads, rows)]
    if counted := [row(label, summary[key]) for label, key in BASELINES.items() if key in summary]:
        lines.append(table(["counting, no network", "bpc", "to best"], counted))
    return "\n".join([*lines, *_training_lines(summary)])


def _training_lines(summary: Mapping[str, Any]) -> list[str]:
    seconds, speed = summary["training_seconds"], summary["tokens_per_second"]
    device, evaluation = summary.get("peak_device_memory_bytes"), summary.get("evaluation_seconds")
    found = {
        "training": f"{summary['steps']:,} steps, {seconds * speed:,.0f} symbols, {summary['parameters']:,} parameters",
        "time": (
            f"{clock(seconds)}, {speed:,.0f} symbols/s, {summary['outside_fraction']:.1%} outside forward, backward and"
            " optimizer" + (f"; evaluation {clock(evaluation)}" if evaluation is not None else "")
        ),
        "memory": (
            f"{byte_text(summary['peak_memory_bytes'])} at most"
            + (f", {byte_text(device)} on the GPU" if device else "")
            + " (rank 0)"
        ),
    }
    if "counted_symbols" in summary:
        found["counting"] = f"order 2 and 3 know the first {summary['counted_symbols']:,} training symbols only"
    if "flops" in summary:
        found["compute"] = f"{count_text(summary['flops'])}FLOP"
    return [f"{label:<10}{text}" for label, text in found.items()]
