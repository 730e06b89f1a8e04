"""Sample from a trained run at any k: `python -m launch.generate run=runs/NAME prompt="def " k=8 length=400`.

`contrast=1` draws away from the same model's logits at that smaller k (SCMoE, arXiv 2405.14507).
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from foreroute.engine.checkpoint.trained_run import open_saved
from foreroute.engine.config.option import check, option, required
from foreroute.engine.errors import UserError, require
from foreroute.engine.evaluation.generate import Contrast, Sampling
from foreroute.engine.evaluation.generate import generate as sample_ids
from foreroute.launch.runs.folder import TextArgs, read_run
from foreroute.launch.start.cli import run_program
from foreroute.launch.start.process import set_up
from foreroute.launch.start.rank_variables import find_device, find_place


@dataclass
class GenerateArgs:
    """Options of a sample."""

    run: str = required("Folder of the run.")
    prompt: str = option("", "Text that the sample continues.")
    prompt_file: str | None = option(None, "A file that has it, or - for standard input; None takes prompt.")
    k: int | None = option(None, "Active experts; None means schedule.k_max of the run.")
    length: int = option(400, "Symbols to sample.", at_least=1)
    temperature: float = option(
        0.8, "Divides the logits: larger is more varied, 0 takes the likeliest symbol.", at_least=0
    )
    top_p: float = option(0.95, "Sample among the likeliest symbols that make up this probability.", above=0, at_most=1)
    contrast: int | None = option(
        None, "A smaller number of active experts, away from whose logits symbols are drawn; None is off.", at_least=1
    )
    contrast_beta: float = option(0.5, "How far away: larger differs more from k alone, 0 not at all.", at_least=0)
    contrast_alpha: float = option(
        0.1,
        "With contrast, symbols with less than this share of the likeliest one's probability are left out; 0 leaves"
        " all, 1 the likeliest alone.",
        at_least=0,
        at_most=1,
    )
    seed: int = option(1, "Of the sample.")
    threads: int = option(0, "CPU threads of PyTorch; 0 leaves its default.")
    corpus: TextArgs = field(default_factory=TextArgs)

    def __post_init__(self) -> None:
        check("", self)
        require(
            not (self.prompt and self.prompt_file),
            f"prompt_file={self.prompt_file}: goes without prompt={self.prompt!r}",
        )
        require(0 <= self.seed < 2**32, f"seed={self.seed}: must be from 0 to 2**32 - 1")


def generate(args: GenerateArgs) -> int:
    """Write the prompt and its continuation to stdout, symbol by symbol as they come; returns the exit code."""
    set_up(args.threads)
    folder = Path(args.run)
    config = read_run(folder, args.corpus)
    k = config.schedule.k_max if args.k is None else args.k
    if config.moe.dense:
        require(args.k is None, f"k={k}: run={folder} is dense, which has no k")
    else:
        experts = config.moe.fewest_experts
        require(1 <= k <= experts, f"k={k}: must be 1 to moe.experts={experts}")
    require(
        args.contrast is None or (not config.moe.dense and args.contrast < k),
        f"contrast={args.contrast}: must be less than k={k}, of a run with experts",
    )
    prompt = _prompt(args)
    device = find_device(find_place())
    saved = open_saved(folder, config, lambda line: print(line, file=sys.stderr), device)
    ends = config.corpus.document_end, saved.corpus.vocab.document_end
    ids = sample_ids(
        saved,
        [int(i) for i in saved.corpus.vocab.encode(prompt)],
        k=k,
        length=args.length,
        sampling=Sampling(args.temperature, args.top_p, torch.Generator().manual_seed(args.seed)),
        document_ends=[end for end in ends if end is not None],
        contrast=_contrast(args),
    )
    out = sys.stdout.buffer
    out.write(prompt)
    for text in saved.corpus.vocab.decode_stream(ids):
        out.write(text)
        out.flush()
    out.write(b"\n")
    return 0


def _contrast(args: GenerateArgs) -> Contrast | None:
    return None if args.contrast is None else Contrast(args.contrast, args.contrast_beta, args.contrast_alpha)


def _prompt(args: GenerateArgs) -> bytes:
    """Return the prompt's bytes."""
    if args.prompt_file is None:
        return os.fsencode(args.prompt)
    if args.prompt_file == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(args.prompt_file).read_bytes()
    except OSError as error:
        raise UserError(f"prompt_file={args.prompt_file}: {error.strerror}") from error


def main() -> None:
    """Entry point."""
    run_program("generate", GenerateArgs, generate)


if __name__ == "__main__":
    main()
