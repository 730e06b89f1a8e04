"""Fine-tuning of a pre-trained encoder for a task, dense or with its feed-forwards as experts."""

from pathlib import Path

from foreroute.engine.config.model import DENSE
from foreroute.engine.errors import require
from foreroute.engine.hugging_face.encoders.bert import encoder_folder
from foreroute.engine.hugging_face.encoders.build import CLIP, EncoderOptions, build_encoder
from foreroute.engine.hugging_face.encoders.registry import read_parts
from foreroute.engine.hugging_face.encoders.tasks import Parts
from foreroute.engine.hugging_face.encoders.texts import WordPieces
from foreroute.launch.finetune.args import FinetuneArgs, StartOf
from foreroute.launch.finetune.job import Examples, Job, check_active, digests, example_files, free_target
from foreroute.launch.start.console import Console
from foreroute.launch.start.rank_variables import find_device, find_place


def job_of_encoder(args: FinetuneArgs, console: Console) -> Job:
    """Read an encoder and its examples."""
    of, path = args.encoder, str(args.encoder.path)
    k, eval_k = _active_experts(args)
    at = of.router if of.router == DENSE else f"{of.router}-k{k}" + (f"-from{args.k_min}" if args.k_min else "")
    kind = f"{args.task.name.name}-{'' if args.pretrained else 'none-'}{at}"
    target = free_target(Path(of.results), args.name or f"{kind}-seed{args.seed}")
    folder = encoder_folder(path)
    words = WordPieces(folder, of.longest)
    parts = read_parts(args.task.name, Path(args.task.path), words, args.held_out, args.seed)
    console.note(
        f"{len(parts.train):,} examples to train on, {len(parts.held_out):,} held out of train to select by, "
        f"{len(parts.dev):,} of dev to report"
    )
    split = of.start is StartOf.split
    options = EncoderOptions(of.router, of.experts, split, args.dropout, args.seed, args.pretrained)
    model = build_encoder(folder, words, parts, options).to(find_device(find_place()))
    console.note(f"{path}: {of.router}" + ("" if of.router == DENSE else f", {of.start.name}, k = {k}"))
    facts = {"router": of.router, "trained_k": None if of.router == DENSE else k}
    return Job(model, _examples(parts, args), k, eval_k, target, CLIP, facts)


def _active_experts(args: FinetuneArgs) -> tuple[int, dict[str, int]]:
    """Return the k to train at, and those to report, by name; by default all experts, half and a quarter of them."""
    experts = args.encoder.experts
    if args.encoder.router == DENSE:
        for name, value in (("k", args.k), ("k_min", args.k_min), ("eval_k", args.eval_k)):
            require(value is None, f"{name}={value}: encoder.router=dense has no k")
        return 1, {"dense": 1}
    k = experts if args.k is None else args.k
    asked = [experts, experts // 2, experts // 4] if args.eval_k is None else args.eval_k
    asked = sorted({number for number in asked if number} if args.eval_k is None else set(asked))
    check_active(args, k, asked, experts, "encoder.experts")
    return k, {str(number): number for number in asked}


def _examples(parts: Parts, args: FinetuneArgs) -> Examples:
    counts = {"train": len(parts.train), "held_out": len(parts.held_out), "dev": len(parts.dev)}
    facts = {**counts, "sha256": digests(example_files(args))}
    return Examples(parts.train, parts.held_out, parts.dev, facts, parts.always)
