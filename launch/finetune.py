"""Fine-tune a trained run on SST-2: `python -m launch.finetune run=runs/NAME task.path=FOLDER [k=8]
[pretrained=false]`.

FOLDER holds GLUE's train.tsv and dev.tsv. Weights are selected by a held-out part of train; dev is looked at once, at
the end, at every k of eval_k. Prints a table and writes RUN/finetune/NAME.json.
"""

import hashlib
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from foreroute.engine.checkpoint.trained_run import SavedRun, open_saved
from foreroute.engine.config import Config, Keys, MoEConfig, Precision, to_plain
from foreroute.engine.config.option import check, option
from foreroute.engine.errors import require
from foreroute.engine.finetune.accuracy import Accuracy, Majority, majority
from foreroute.engine.finetune.classifier import Classifier
from foreroute.engine.finetune.glue import Example, hold_out, read_examples
from foreroute.engine.finetune.loop import Point, Recipe, Selection
from foreroute.engine.finetune.loop import finetune as train_and_select
from foreroute.engine.finetune.sentences import Sentence, encode, foreign_bytes
from foreroute.engine.model.build import build_model, fill_signatures
from foreroute.engine.moe.int8_weights import holds_int8
from foreroute.launch.runs.folder import TextArgs, read_run, write_json
from foreroute.launch.start.cli import run_program
from foreroute.launch.start.console import Console, table
from foreroute.launch.start.process import StopSignal, set_up
from foreroute.launch.start.rank_variables import find_device, find_place

TRAIN, DEV = "train.tsv", "dev.tsv"


@dataclass
class TaskArgs:
    """The examples."""

    path: str = option("", "Folder of GLUE's train.tsv and dev.tsv; needed.")


@dataclass
class FinetuneArgs:
    """Options; the defaults are the published recipe, shortened."""

    run: str = option("", "Folder of the trained run; needed.")
    task: TaskArgs = field(default_factory=TaskArgs)
    name: str | None = option(None, "Name of the result; None makes it of pretrained, k and seed.")
    pretrained: bool = option(True, "false: the same model from new weights, drawn from `seed`, with the run's tables.")
    k: int | None = option(None, "Active experts in fine-tuning; None means schedule.k_max of the run.")
    eval_k: list[int] | None = option(None, "Numbers of active experts on dev; None means eval.k of the run, and k.")
    steps: int = option(1500, "Optimizer steps for each learning rate.", at_least=1)
    batch: int = option(16, "Sentences in a step.", at_least=1)
    lr: list[float] = option([1e-4], "Learning rates; each is tried, and the best is selected.")
    eval_every: int = option(250, "Steps between two looks at the held-out examples.", at_least=1)
    held_out: int = option(1000, "Examples of train to select by.", at_least=1)
    dropout: float = option(0.1, "Of the model and the head.", at_least=0, below=1)
    seed: int = option(1, "Of the held-out examples, the order of the others, dropout, the head, and new weights.")
    threads: int = option(0, "CPU threads of PyTorch; 0 leaves its default.")
    corpus: TextArgs = field(default_factory=TextArgs)

    def __post_init__(self) -> None:
        require(bool(self.run), "run is missing: the folder of a trained run")
        require(bool(self.task.path), f"task.path is missing: the folder of {TRAIN} and {DEV}")
        check("", self)
        require(len(self.lr) > 0 and min(self.lr) > 0, f"lr={self.lr}: needs one or more, each above 0")
        require(0 <= self.seed < 2**32, f"seed={self.seed}: must be from 0 to 2**32 - 1")
        plain = self.name is None or (self.name and "/" not in self.name and self.name[0] != ".")
        require(bool(plain), f"name={self.name!r}: must be a plain file name, without .json")

    @property
    def total_steps(self) -> int:
        """Steps over all learning rates."""
        return self.steps * len(self.lr)


@dataclass(frozen=True, slots=True)
class _Examples:
    """The examples and what they were made of."""

    train: list[Sentence]
    held_out: list[Sentence]
    dev: list[Sentence]
    facts: dict[str, Any]


def finetune(args: FinetuneArgs) -> int:
    """Fine-tune; returns the exit code."""
    set_up(args.threads)
    stop = StopSignal()  # ends the program at once: a result is written whole or not at all
    started = time.perf_counter()
    folder = Path(args.run)
    config = _config(args)
    k, eval_k = _active_experts(args, config.moe, config.schedule.k_max, config.eval.k)
    trained_k = None if config.moe.dense else k
    target = _target(folder, args, trained_k)
    console = Console(args.total_steps)
    read = {name: read_examples(Path(args.task.path) / name) for name in (TRAIN, DEV)}
    saved = open_saved(folder, config, console.note)
    require(
        not holds_int8(saved.model),
        f"run={folder}: has int8 weights, for evaluation alone; take the run it was made of",
    )
    examples = _prepare(read, saved, args, console)
    console.note(_heading(folder, saved, args, k))
    try:
        with closing(console):
            found, scores = _run(_classifier(saved, args), examples, args, k, eval_k, console)
    except SystemExit:
        console.note("stopped; no result was written")
        raise
    always = majority([sentence.label for sentence in examples.dev])
    result = {
        **_scores(scores, always),
        "selection": asdict(found),
        "examples": examples.facts,
        "router": config.moe.router,
        "run_step": saved.step,
        "trained_k": trained_k,
        "settings": to_plain(args),
        "seconds": time.perf_counter() - started,
    }
    with stop.deferred():
        target = _write(target, result)
    print(_report(found, scores, always))
    print(f"{target} has all of it; {found.sentences / found.seconds:,.0f} sentences/s in training")
    return 0


def _run(
    classifier: Classifier, examples: _Examples, args: FinetuneArgs, k: int, eval_k: dict[str, int], console: Console
) -> tuple[Selection, dict[str, Accuracy]]:
    """Train and select at k; then evaluate on dev, once for each name of eval_k."""
    recipe = Recipe(k, args.steps, args.batch, tuple(args.lr), args.eval_every, args.seed)
    progress = _Progress(console, args.total_steps)
    found = train_and_select(classifier, examples.train, examples.held_out, recipe, progress)
    return found, {name: classifier.evaluate(examples.dev, k).accuracy for name, k in eval_k.items()}


def _config(args: FinetuneArgs) -> Config:
    """Read the run's configuration and set fine-tuning's dropout and fp32.

    The run's seed stays: tables at the input follow from it.
    """
    config = read_run(Path(args.run), args.corpus)
    return replace(
        config, model=replace(config.model, dropout=args.dropout), train=replace(config.train, precision=Precision.fp32)
    )


def _active_experts(
    args: FinetuneArgs, moe: MoEConfig, k_max: int, eval_k: Sequence[int]
) -> tuple[int, dict[str, int]]:
    """Return the k to train at, and those to report, by name; by default the run's k_max and eval_k."""
    if moe.dense:
        require(args.k is None, f"k={args.k}: run={args.run} is dense, which has no k")
        return 1, {"dense": 1}
    require(
        moe.keys is Keys.own,
        f"moe.keys={moe.keys.name}: a control that cannot be fine-tuned: a sentence's experts would follow from"
        " its neighbours",
    )
    experts = moe.fewest_experts
    k = k_max if args.k is None else args.k
    require(1 <= k <= experts, f"k={k}: must be 1 to moe.experts={experts}")
    asked = [*eval_k, k] if args.eval_k is None else args.eval_k
    require(
        len(asked) > 0 and min(asked) >= 1 and max(asked) <= experts,
        f"eval_k={asked}: needs one or more, each 1 to moe.experts={experts}",
    )
    return k, {str(k): k for k in sorted(set(asked))}


def _target(folder: Path, args: FinetuneArgs, trained_k: int | None) -> Path:
    """Return the result's file, which must not exist."""
    start = "pretrained" if args.pretrained else "none"
    at = "" if trained_k is None else f"-k{trained_k}"
    target = folder / "finetune" / f"{args.name or f'{start}{at}-seed{args.seed}'}.json"
    require(not target.exists(), f"{target} is there already: take another name=NAME, or remove it")
    return target


def _write(target: Path, result: dict[str, Any]) -> Path:
    """Write the result; return its path, which is another one if the name was taken meanwhile."""
    target.parent.mkdir(exist_ok=True)
    while target.exists():
        target = target.with_stem(f"{target.stem}-again")
    write_json(target, result)
    return target


def _prepare(read: dict[str, list[Example]], saved: SavedRun, args: FinetuneArgs, console: Console) -> _Examples:
    """Hold examples out and encode all as ids."""
    vocab = saved.corpus.vocab
    train, held_out = hold_out(read[TRAIN], args.held_out, args.seed)
    parts = {"train": train, "held_out": held_out, "dev": read[DEV]}
    foreign = sum(foreign_bytes(examples, vocab) for examples in parts.values())
    too_like = len(read[TRAIN]) - len(train) - len(held_out)
    console.note(
        f"{len(train):,} sentences to train on, {len(held_out):,} held out of train to select by "
        f"({too_like:,} too like them are in neither), {len(read[DEV]):,} of dev to report"
    )
    if foreign:
        console.note(f"{foreign:,} bytes are not in the run's vocabulary and are left out")
    facts = {
        **{name: len(examples) for name, examples in parts.items()},
        "foreign_bytes": foreign,
        "sha256": {
            name: hashlib.sha256((Path(args.task.path) / name).read_bytes()).hexdigest() for name in (TRAIN, DEV)
        },
    }
    encoded = {name: encode(examples, vocab) for name, examples in parts.items()}
    return _Examples(**encoded, facts=facts)


def _classifier(saved: SavedRun, args: FinetuneArgs) -> Classifier:
    """Return the run's model, or a new one like it, with a new head, on this machine's device."""
    if not args.pretrained:
        saved = replace(saved, model=build_model(saved.config, saved.corpus.vocab.size, weights_seed=args.seed))
        fill_signatures(saved)
    torch.manual_seed(args.seed)
    return Classifier(saved).to(find_device(find_place()))


class _Progress:
    """Fine-tuning on the console."""

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.total, self.start = console, total, time.perf_counter()
        self.step = console.step

    def point(self, step: int, point: Point) -> None:
        """Show the accuracy on the held-out examples."""
        left = (time.perf_counter() - self.start) / step * (self.total - step)
        text = f"loss {point.training_loss:.3f} held-out {100 * point.held_out.share:.1f} %"
        self.console.say(step, f"lr {point.lr:g} {text}", left)


def _heading(folder: Path, saved: SavedRun, args: FinetuneArgs, k: int) -> str:
    of = "dense" if saved.config.moe.dense else f"router {saved.config.moe.router}, k = {k}"
    start = f"at step {saved.step}" if args.pretrained else "without its weights (pretrained=false)"
    return f"{folder} {start}: {of}"


def _scores(scores: dict[str, Accuracy], always: Majority) -> dict[str, Any]:
    """Return the scores for the file."""
    return {
        "dev": {
            name: {
                "accuracy": score.share,
                "interval_95": list(score.interval),
                "correct": score.correct,
                "examples": score.examples,
                "better_than_majority": score.beats(always.share),
            }
            for name, score in scores.items()
        },
        "majority": always._asdict(),
    }


def _report(found: Selection, scores: dict[str, Accuracy], always: Majority) -> str:
    """Return the lines that the console shows at the end."""
    chosen = found.chosen
    names = {name: f"k = {name}" if name.isdigit() else name for name in scores}
    rows = [
        [names[name], _percent(score.share), " to ".join(map(_percent, score.interval))]
        for name, score in scores.items()
    ]
    rows.append([f"always {always.label}", _percent(always.share), ""])
    lines = [
        f"selected lr {chosen.lr:g}, step {chosen.step}: held-out {_percent(chosen.held_out.share)} %",
        table(["dev", "accuracy %", "95 % interval"], rows),
    ]
    near = [names[name] for name, score in scores.items() if not score.beats(always.share)]
    if near:
        lines.append(f"not better than always saying {always.label}: {', '.join(near)}")
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def main() -> None:
    """Entry point."""
    run_program("finetune", FinetuneArgs, finetune)


if __name__ == "__main__":
    main()
