"""Analysis of a trained run's experts and routes: `python -m launch.analyse run=runs/NAME`.

Reads the run's whole checkpoints, the newest one and those at multiples of train.save_every (not what a stop left), and
draws its initialisation anew from the seed. Prints a summary and writes analysis.json into the run's folder: similarity
of the experts' outputs and weights at the start and the end, load and mixing weights at each k, and how many tokens
changed their experts from checkpoint to checkpoint (engine/evaluation/expert_analysis.py).

Of a live router it also tells how far its choices are a function of the last ids, and `table=FILE` writes the table
that does the same, for moe.router=token_table (engine/evaluation/ngram_routes.py).
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreroute.engine.checkpoint.files import checkpoints
from foreroute.engine.checkpoint.save_load import load_weights, read_manifest
from foreroute.engine.checkpoint.trained_run import SavedRun, open_saved
from foreroute.engine.config import Keys, MoEConfig, Split
from foreroute.engine.config.model import MAX_NGRAM
from foreroute.engine.config.option import check, option, required
from foreroute.engine.errors import UserError, require
from foreroute.engine.evaluation.expert_analysis import (
    LayerSeen,
    observe,
    output_similarity,
    route_statistics,
    routing_change,
    weight_similarity,
)
from foreroute.engine.evaluation.ngram_routes import Experts, agreement, input_keys, table_of
from foreroute.engine.evaluation.route_record import record
from foreroute.engine.model.build import build_model
from foreroute.engine.model.transformer_xl import TransformerXL
from foreroute.engine.routing.methods import live_method, planned_method
from foreroute.engine.routing.ngram_rows import KeyRows
from foreroute.engine.sealed_files import replacing
from foreroute.launch.runs.folder import ANALYSIS, TextArgs, read_run, write_json
from foreroute.launch.start.cli import run_program
from foreroute.launch.start.console import table
from foreroute.launch.start.process import set_up

NGRAMS = 1, 2, 3
"""Ids in the keys with which a live router's choices are compared."""


def _lasting(moe: MoEConfig) -> bool:
    """Return whether a token's experts follow from the text and the weights; else they are drawn anew in every pass."""
    planned = planned_method(moe)
    return moe.keys is not Keys.shuffled and (planned is None or planned.of_ids)


@dataclass
class AnalyseArgs:
    """Options."""

    run: str = required("Folder of the run.")
    split: Split = Split.test
    symbols: int = option(
        4096, "Text that is looked at: the first so many symbols of the split, in whole segments.", at_least=1
    )
    counted: int = option(
        65536,
        "Of a live router: the first so many symbols of the training split, on which is counted what each n-gram"
        " chooses.",
        at_least=1,
    )
    table: str | None = option(
        None, "Of a live router: .npy file for the table of each layer that these counts make, [layers, rows, experts]."
    )
    table_ngram: int = option(1, "Ids in the keys of that table.", at_least=1, at_most=MAX_NGRAM)
    table_rows: int = option(
        65536,
        "Its rows for longer keys than one id; keys beyond them share rows by hash, as in a run of the same seed.",
        at_least=1,
    )
    threads: int = option(0, "CPU threads of PyTorch; 0 leaves its default.")
    corpus: TextArgs = field(default_factory=TextArgs)

    def __post_init__(self) -> None:
        check("", self)


def analyse(args: AnalyseArgs) -> int:
    """Measure, print and write; returns the exit code."""
    set_up(args.threads)
    folder = Path(args.run)
    config = read_run(folder, args.corpus)
    require(not config.moe.dense, f"run={folder}: a dense model has no experts")
    require(not config.moe.by_layer, f"run={folder}: has moe.by_layer; only layers of equal options are analysed")
    saved = open_saved(folder, config, print)
    require(
        args.table is None or (is_live(saved) and args.table.endswith(".npy")),
        f"table={args.table}: must be a .npy file, and moe.router={config.moe.router} a live router",
    )
    found = measure(saved, folder, args.split, args.symbols)
    found["ngrams"] = None
    if is_live(saved):
        seen = _experts(saved, Split.train, args.counted)
        found["ngrams"] = ngrams(saved, seen, args.split, args.symbols)
        if args.table is not None:
            write_table(Path(args.table), saved, seen, args.table_ngram, args.table_rows)
    write_json(folder / ANALYSIS, found)
    print(_summary(found))
    print(f"written: {folder / ANALYSIS}")
    if args.table is not None:
        print(f"written: {args.table}")
    return 0


def measure(saved: SavedRun, folder: Path, split: Split, symbols: int) -> dict[str, Any]:
    """Measure an opened run and its earlier checkpoints; returns the content of analysis.json."""
    config, k_max = saved.config, saved.config.schedule.k_max
    half = max(1, config.moe.experts // 2)

    def look(model: TransformerXL, k: int) -> list[LayerSeen]:
        return observe(replace(saved, model=model), k=k, symbols=symbols, split=split)

    def outputs(of: list[LayerSeen]) -> float | None:
        return _mean([output_similarity(layer) for layer in of])

    def weights(of: list[LayerSeen]) -> float | None:
        return _mean([weight_similarity(layer.experts) for layer in of])

    seen = {k: look(saved.model, k) for k in sorted({*config.eval.k, k_max, half})}
    initial = build_model(config, saved.corpus.vocab.size).eval()
    first = look(initial, k_max)
    change = None
    if _lasting(config.moe):
        steps = {0: look(initial, half), **_earlier(saved, folder, lambda model: look(model, half))}
        change = _changes({**steps, saved.step: seen[half]})
    return {
        "step": saved.step,
        "split": split.name,
        "symbols": len(first[0].hidden_TD),
        "k_max": k_max,
        "routes": {str(k): asdict(route_statistics(layers)) for k, layers in seen.items()},
        "output_similarity": {"start": outputs(first), "end": outputs(seen[k_max])},
        "weight_similarity": {"start": weights(first), "end": weights(seen[k_max])},
        "routing_change": {"k": half, "between": change},
    }


def is_live(saved: SavedRun) -> bool:
    """Return whether a run has a live router whose routes can be counted."""
    moe = saved.config.moe
    return live_method(moe) is not None and moe.columns == moe.experts


def ngrams(saved: SavedRun, counted: Experts, split: Split, symbols: int) -> dict[str, Any]:
    """Compare the routes of the first symbols of a split with what n-grams chose in those counted, layer by layer."""
    corpus, vocab_size, experts = saved.corpus, saved.corpus.vocab.size, saved.config.moe.experts
    held_out = _experts(saved, split, symbols)
    layers: list[dict[str, Any]] = [{} for _ in range(counted.shape[1])]
    for ngram in NGRAMS:
        rows = KeyRows(ngram, vocab_size, 1, 0, 0)
        keys = input_keys(corpus, Split.train, len(counted), rows), input_keys(corpus, split, len(held_out), rows)
        for layer, found in enumerate(layers):
            of_layer = agreement(keys[0], counted[:, layer], keys[1], held_out[:, layer], experts)
            found[str(ngram)] = asdict(of_layer)
    return {"counted": len(counted), "held_out": len(held_out), "layers": layers}


def write_table(path: Path, saved: SavedRun, counted: Experts, ngram: int, rows: int) -> None:
    """Write the tables of all layers as an array [layers, rows, experts].

    Raises:
        UserError: the file cannot be written.
    """
    config, vocab_size = saved.config, saved.corpus.vocab.size
    found = []
    for layer in range(counted.shape[1]):
        key_rows = KeyRows(ngram, vocab_size, vocab_size if ngram == 1 else rows, config.train.seed, layer)
        key_N = input_keys(saved.corpus, Split.train, len(counted), key_rows)
        found.append(table_of(key_N, counted[:, layer], key_rows, config.moe.experts))
    try:
        with replacing(path) as new, new.open("wb") as file:
            np.save(file, np.stack(found), allow_pickle=False)
    except OSError as error:
        raise UserError(f"table={path}: cannot be written ({error.strerror})") from error


def _experts(saved: SavedRun, split: Split, symbols: int) -> Experts:
    """Return the experts [n, layers, k] of the first symbols of a split, at schedule.k_max."""
    count = min(symbols, len(saved.corpus.split(split)))

    def make(layers: int, columns: int) -> tuple[Experts, NDArray[np.float32]]:
        shape = count, layers, columns
        return np.empty(shape, np.uint16), np.empty(shape, np.float32)

    return record(saved, split, saved.config.schedule.k_max, make, max_symbols=count)[0][0]


def _earlier(
    saved: SavedRun, folder: Path, look: Callable[[TransformerXL], list[LayerSeen]]
) -> dict[int, list[LayerSeen]]:
    """Measure each earlier whole checkpoint of train.save_every, by its step, in a model of its own; stops left
    others."""
    every = saved.config.train.save_every
    model = build_model(saved.config, saved.corpus.vocab.size).eval()
    found = {}
    for path in reversed(checkpoints(folder / "checkpoints")):
        step = read_manifest(path)["step"]
        if step < saved.step and every and step % every == 0:
            load_weights(path, model)
            found[step] = look(model)
    return found


def _changes(seen: dict[int, list[LayerSeen]]) -> list[dict[str, float]]:
    """Compute the share of tokens whose experts differ, from each step to the next, and from the first to the last."""
    steps = sorted(seen)
    pairs = [*pairwise(steps), *([(steps[0], steps[-1])] if len(steps) > 2 else [])]
    return [{"from": a, "to": b, "share": routing_change(seen[a], seen[b])} for a, b in pairs]


def _mean(values: list[float]) -> float | None:
    """Compute the mean over layers; None where there are no pairs of experts."""
    mean = sum(values) / len(values)
    return mean if math.isfinite(mean) else None


def _summary(found: dict[str, Any]) -> str:
    """Lay out what was measured for the terminal."""
    rows = []
    for k, found_k in found["routes"].items():
        load, entropy, weights = (found_k[name] for name in ("load_max_over_mean", "load_entropy", "weight_entropy"))
        rows.append([f"k = {k}", f"{load:.3f}", f"{entropy:.4f}", f"{math.exp(weights):.2f}"])
    lines = [table(["", "busiest expert / mean", "load entropy / log E", "experts by weight"], rows)]
    for name in ("output_similarity", "weight_similarity"):
        start, end = found[name]["start"], found[name]["end"]
        if end is not None:
            what = name.replace("_", " ")
            lines.append(f"{what} of experts: {start:.3f} at the start, {end:.3f} at step {found['step']}")
    for change in found["routing_change"]["between"] or []:
        lines.append(
            f"step {change['from']} to {change['to']}: {change['share']:.1%} of tokens changed their"
            f" {found['routing_change']['k']} experts"
        )
    if found["ngrams"] is not None:
        lines += _ngram_lines(found["ngrams"])
    return "\n".join(lines)


def _ngram_lines(found: dict[str, Any]) -> list[str]:
    rows = [
        [str(layer), *(f"{shares[str(ngram)][name]:.1%}" for ngram in NGRAMS for name in ("sets", "seen"))]
        for layer, shares in enumerate(found["layers"])
    ]
    header = ["layer", *(text for ngram in NGRAMS for text in (f"n = {ngram}", "seen"))]
    return [
        f"tokens with the modal experts of their last n ids, on {found['held_out']:,} symbols, and with ids seen in the"
        f" {found['counted']:,} that were counted:",
        table(header, rows),
    ]


def main() -> None:
    """Entry point."""
    run_program("analyse", AnalyseArgs, analyse)


if __name__ == "__main__":
    main()
