"""Held-out bits per symbol of a trained run at any k: `python -m launch.evaluate run=runs/NAME k=[1,2,4,8,16]`.

`protocol=published` is Transformer-XL's own final evaluation (segments of 80, memory 2100, clamp 820, same length);
the default is the run's own eval section. Prints a table and, as its last line, one JSON object.
"""

import json
from contextlib import closing
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from pathlib import Path

from foreroute.engine.checkpoint.trained_run import open_saved
from foreroute.engine.config import Config, EvalConfig, Split
from foreroute.engine.config.option import option, required
from foreroute.engine.evaluation.held_out import slimming_curve
from foreroute.engine.parallel.world import World
from foreroute.launch.runs.folder import TextArgs, read_run
from foreroute.launch.start.cli import run_program
from foreroute.launch.start.console import Stages, table
from foreroute.launch.start.process import set_up
from foreroute.launch.start.rank_variables import find_device, find_place


class Protocol(Enum):
    """Segment, memory, clamp and mask of an evaluation."""

    run = "run"
    published = "published"


@dataclass
class EvaluateArgs:
    """Options; None means the run's own."""

    run: str = required("Folder of the run.")
    k: list[int] | None = option(None, "Numbers of active experts to evaluate.")
    split: Split | None = None
    protocol: Protocol = Protocol.run
    streams: int | None = option(None, "Contiguous shares of the split; changes speed, not the result.")
    segment: int | None = option(None, "Symbols per forward pass.")
    memory: int | None = option(None, "Memory length.")
    clamp_len: int | None = option(None, "Distances beyond this count as this; 0 for no clamp.")
    same_length: bool | None = option(None, "Every symbol sees exactly `memory` positions.")
    max_symbols: int | None = option(None, "Evaluate only the first so many symbols of the split; 0 for all.")
    threads: int = option(0, "CPU threads of PyTorch; 0 leaves its default.")
    corpus: TextArgs = field(default_factory=TextArgs)


PUBLISHED = {"segment": 80, "memory": 2100, "clamp_len": 820, "same_length": True}


def evaluation_config(args: EvaluateArgs) -> Config:
    """Return the run's configuration with the requested evaluation (validated)."""
    config = read_run(Path(args.run), args.corpus)
    changes: dict[str, object] = dict(PUBLISHED) if args.protocol is Protocol.published else {}
    for each in fields(EvalConfig):
        asked = getattr(args, each.name)
        if asked is not None:
            changes[each.name] = asked
    return replace(config, eval=replace(config.eval, **changes))  # type: ignore[arg-type]


def evaluate(args: EvaluateArgs) -> int:
    """Evaluate; returns the exit code."""
    set_up(args.threads)
    folder = Path(args.run)
    config = evaluation_config(args)
    device = find_device(find_place())
    saved = open_saved(folder, config, print, device)
    world = World(device=device)
    with closing(Stages()) as progress:
        curve = slimming_curve(saved, world, progress)
    rows = [
        [
            name,
            f"{found.bpc:.4f}",
            "" if found.bits_per_byte is None else f"{found.bits_per_byte:.4f}",
            f"{found.perplexity:.3f}",
            f"{found.symbols:,}",
            f"{found.symbols / found.seconds:,.0f}",
        ]
        for name, found in curve.items()
    ]
    print(f"{folder} at step {saved.step}, {config.eval.split.name} split, {config.corpus.tokens.name}")
    print(table(["k", "bpc", "bits/byte", "perplexity", "symbols", "symbols/s"], rows))
    bpc = {name: found.bpc for name, found in curve.items()}
    bits_per_byte = {name: found.bits_per_byte for name, found in curve.items()}
    found = {"bpc": bpc, "bits_per_byte": bits_per_byte, "split": config.eval.split.name, "step": saved.step}
    print(json.dumps(found))
    return 0


def main() -> None:
    """Entry point."""
    run_program("evaluate", EvaluateArgs, evaluate)


if __name__ == "__main__":
    main()
