"""One rank that trains several small runs for a few steps each and reports the time of each step.

    python -m benchmarks.models.step_rank CASES.json FOLDER

CASES.json is a list of configurations as engine.config.to_plain returns them. The program is started alone or by
benchmarks/machines/cluster.py with the launcher variables. Rank 0 prints one JSON list: for each case the metrics of
every step (engine/train/trainer.py). FOLDER takes caches. No checkpoint is written: of a large table it would take
longer than the steps.
"""

import argparse
import gc
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from foreroute.engine.data.corpus import prepare
from foreroute.engine.metrics.writer import Metrics
from foreroute.engine.model.build import build_routers
from foreroute.engine.replay.rank import Silent
from foreroute.engine.train.trainer import Trainer
from foreroute.launch.start.config_files import config_of
from foreroute.launch.start.meeting import connected
from foreroute.launch.start.process import leaving_at_once, set_up


class Kept(Metrics):
    """Keeps what a run would write."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Keep the metrics of a step."""
        self.rows.append({name: value for name, value in values.items() if value is not None})


class Unsaved(Trainer):
    """A Trainer that writes no checkpoint."""

    def save(self) -> Path:
        """Write nothing; return the folder of checkpoints."""
        return self.checkpoints


def time_steps(plain: Mapping[str, Any], folder: Path, number: int) -> list[dict[str, float]]:
    """Train a case, given by its plain options; return the metrics of every step on rank 0, nothing elsewhere."""
    config = config_of(plain)
    config = replace(config, train=replace(config.train, log_every=1, keep=1, threads=1))
    with connected(config.parallel, {"case": number}) as world:
        corpus = prepare(config.corpus, lambda line: None)
        routers = build_routers(config, corpus, world.mesh)
        trainer = Unsaved(config, corpus, routers, folder, Silent(), world)
        kept = Kept() if world.first else None
        trainer.run(kept, lambda: False)
        return kept.rows if kept else []


def main() -> None:
    """Run as one rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    cases: list[Any] = json.loads(args.cases.read_text())
    set_up(threads=1)
    found = []
    for number, plain in enumerate(cases):
        found.append(time_steps(plain, args.folder / f"case-{number}", number))
        gc.collect()
    if found[0]:
        print(json.dumps(found))


if __name__ == "__main__":
    with leaving_at_once():
        main()
