"""Analysis of a trained run's experts and routes: `python -m launch.analyse run=runs/NAME`.

Reads the run's whole checkpoints, the newest one and those at multiples of train.save_every (not what a stop left), and
draws its initialisation anew from the seed. Prints a summary and writes analysis.json into the run's folder: similarity
of the experts' outputs and weights at the start and the end, load and mixing weights at each k, and how many tokens
changed their experts from checkpoint to checkpoint (engine/evaluation/expert_analysis.py).
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from foreroute.engine.checkpoint.files import checkpoints
from foreroute.engine.checkpoint.save_load import load_weights, read_manifest
from foreroute.engine.checkpoint.trained_run import SavedRun, open_saved
from foreroute.engine.config import Keys, MoEConfig, Split
from foreroute.engine.config.option import check, option, required
from foreroute.engine.errors import require
from foreroute.engine.evaluation.expert_analysis import (
    LayerSeen,
    observe,
    output_similarity,
    route_statistics,
    routing_change,
    weight_similarity,
)
from foreroute.engine.model.build import build_model
from foreroute.engine.model.transformer_xl import TransformerXL
from foreroute.engine.routing.methods import planned_method
from foreroute.launch.runs.folder import ANALYSIS, TextArgs, read_run, write_json
from foreroute.launch.start.cli import run_program
from foreroute.launch.start.console import table
from foreroute.launch.start.process import set_up


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
    saved = open_saved(folder, config, print)
    found = measure(saved, folder, args.split, args.symbols)
    write_json(folder / ANALYSIS, found)
    print(_summary(found))
    print(f"written: {folder / ANALYSIS}")
    return 0


def measure(saved: SavedRun, folder: Path, split: Split, symbols: int) -> dict[str, Any]:
    """Measure an opened run and its earlier checkpoints; returns the content of analysis.json."""
    config, k_max = saved.config, saved.config.schedule.k_max
    half = max(1, config.moe.experts // 2)

    def look(model: TransformerXL, k: int) -> list[LayerSeen]:
        return observe(replace(saved, model=model), k=k, symbols=symbols, split=split)

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
        "output_similarity": {"start": _outputs(first), "end": _outputs(seen[k_max])},
        "weight_similarity": {"start": _weights(first), "end": _weights(seen[k_max])},
        "routing_change": {"k": half, "between": change},
    }


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


def _outputs(seen: list[LayerSeen]) -> float | None:
    return _mean([output_similarity(layer) for layer in seen])


def _weights(seen: list[LayerSeen]) -> float | None:
    return _mean([weight_similarity(layer.experts) for layer in seen])


def _mean(values: list[float]) -> float | None:
    """Compute the mean over layers; None where there are no pairs of experts."""
    mean = sum(values) / len(values)
    return mean if math.isfinite(mean) else None


def _summary(found: dict[str, Any]) -> str:
    """Lay out what was measured for the terminal."""
    rows = [
        [
            f"k = {k}",
            f"{s['load_max_over_mean']:.3f}",
            f"{s['load_entropy']:.4f}",
            f"{math.exp(s['weight_entropy']):.2f}",
        ]
        for k, s in found["routes"].items()
    ]
    lines = [table(["", "busiest expert / mean", "load entropy / log E", "experts by weight"], rows)]
    for name in ("output_similarity", "weight_similarity"):
        start, end = found[name]["start"], found[name]["end"]
        if end is not None:
            lines.append(
                f"{name.replace('_', ' ')} of experts: {start:.3f} at the start, {end:.3f} at step {found['step']}"
            )
    for change in found["routing_change"]["between"] or []:
        lines.append(
            f"step {change['from']} to {change['to']}: {change['share']:.1%} of tokens changed their"
            f" {found['routing_change']['k']} experts"
        )
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    run_program("analyse", AnalyseArgs, analyse)


if __name__ == "__main__":
    main()
