"""Fine-tuning of a trained run: its model whole, with a new head, on sentences with labels."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from foreroute.engine.checkpoint.trained_run import SavedRun, open_saved
from foreroute.engine.config import Config, Keys, MoEConfig, Precision
from foreroute.engine.errors import require
from foreroute.engine.finetune.accuracy import majority
from foreroute.engine.finetune.classifier import Classifier
from foreroute.engine.finetune.glue import Example, hold_out, read_examples
from foreroute.engine.finetune.loop import CLIP
from foreroute.engine.finetune.sentences import encode, foreign_bytes
from foreroute.engine.model.build import build_model, fill_signatures
from foreroute.engine.moe.int8_weights import holds_int8
from foreroute.launch.finetune.args import FinetuneArgs
from foreroute.launch.finetune.job import Examples, Job, check_active, digests, example_files, free_target
from foreroute.launch.runs.folder import read_run
from foreroute.launch.start.console import Console
from foreroute.launch.start.rank_variables import find_device, find_place


def job_of_run(args: FinetuneArgs, console: Console) -> Job:
    """Read a run and its examples."""
    folder = Path(args.run)
    config = config_of(args)
    k, eval_k = _active_experts(args, config.moe, config.schedule.k_max, config.eval.k)
    trained_k = None if config.moe.dense else k
    start = "pretrained" if args.pretrained else "none"
    at = "" if trained_k is None else f"-k{trained_k}"
    target = free_target(folder / "finetune", args.name or f"{start}{at}-seed{args.seed}")
    train, dev = map(read_examples, example_files(args))
    saved = open_saved(folder, config, console.note)
    require(
        not holds_int8(saved.model),
        f"run={folder}: has int8 weights, for evaluation alone; take the run it was made of",
    )
    examples = _prepare(train, dev, saved, args, console)
    console.note(_heading(folder, saved, args, k))
    facts = {"router": config.moe.router, "run_step": saved.step, "trained_k": trained_k}
    return Job(classifier_of(saved, args), examples, k, eval_k, target, CLIP, facts)


def config_of(args: FinetuneArgs) -> Config:
    """Read the run's configuration and set fine-tuning's dropout and fp32.

    The run's seed stays: tables at the input follow from it.
    """
    config = read_run(Path(args.run), args.corpus)
    return replace(
        config, model=replace(config.model, dropout=args.dropout), train=replace(config.train, precision=Precision.fp32)
    )


def classifier_of(saved: SavedRun, args: FinetuneArgs) -> Classifier:
    """Return the run's model, or a new one like it, with a new head, on this machine's device."""
    if not args.pretrained:
        saved = replace(saved, model=build_model(saved.config, saved.corpus.vocab.size, weights_seed=args.seed))
        fill_signatures(saved)
    torch.manual_seed(args.seed)
    return Classifier(saved).to(find_device(find_place()))


def _active_experts(
    args: FinetuneArgs, moe: MoEConfig, k_max: int, eval_k: Sequence[int]
) -> tuple[int, dict[str, int]]:
    """Return the k to train at, and those to report, by name; by default the run's k_max and eval_k."""
    if moe.dense:
        for name, value in (("k", args.k), ("k_min", args.k_min)):
            require(value is None, f"{name}={value}: run={args.run} is dense, which has no k")
        return 1, {"dense": 1}
    require(
        moe.keys is Keys.own,
        f"moe.keys={moe.keys.name}: a control that cannot be fine-tuned: a sentence's experts would follow from"
        " its neighbours",
    )
    k = k_max if args.k is None else args.k
    asked = [*eval_k, k] if args.eval_k is None else args.eval_k
    check_active(args, k, asked, moe.fewest_experts, "moe.experts")
    return k, {str(k): k for k in sorted(set(asked))}


def _prepare(
    train: list[Example], dev: list[Example], saved: SavedRun, args: FinetuneArgs, console: Console
) -> Examples:
    """Hold examples out and encode all as ids."""
    vocab = saved.corpus.vocab
    rest, held_out = hold_out(train, args.held_out, args.seed)
    parts = {"train": rest, "held_out": held_out, "dev": dev}
    foreign = sum(foreign_bytes(examples, vocab) for examples in parts.values())
    too_like = len(train) - len(rest) - len(held_out)
    console.note(
        f"{len(rest):,} sentences to train on, {len(held_out):,} held out of train to select by "
        f"({too_like:,} too like them are in neither), {len(dev):,} of dev to report"
    )
    if foreign:
        console.note(f"{foreign:,} bytes are not in the run's vocabulary and are left out")
    facts = {
        **{name: len(examples) for name, examples in parts.items()},
        "foreign_bytes": foreign,
        "sha256": digests(example_files(args)),
    }
    encoded = {name: encode(examples, vocab) for name, examples in parts.items()}
    return Examples(**encoded, facts=facts, always=majority([example.label for example in dev]))


def _heading(folder: Path, saved: SavedRun, args: FinetuneArgs, k: int) -> str:
    of = "dense" if saved.config.moe.dense else f"router {saved.config.moe.router}, k = {k}"
    start = f"at step {saved.step}" if args.pretrained else "without its weights (pretrained=false)"
    return f"{folder} {start}: {of}"
