"""Fine-tune a trained run on SST-2: `python -m launch.finetune run=runs/NAME task.path=FOLDER [k=8]
[pretrained=false]`; or a pre-trained encoder: `task=sst2|csqa|mlm|asdiv|mawps|svamp task.path=FOLDER
encoder.path=minilm`.

Weights are selected by a held-out part of train; dev is looked at once, at the end, at every k of eval_k. Prints a
table and writes RUN/finetune/NAME.json, or encoder.results/NAME.json.
"""

import time
from contextlib import closing
from dataclasses import asdict

from foreroute.engine.config import to_plain
from foreroute.engine.finetune.accuracy import Accuracy
from foreroute.engine.finetune.loop import Recipe, Selection
from foreroute.engine.finetune.loop import finetune as train_and_select
from foreroute.launch.finetune.args import FinetuneArgs
from foreroute.launch.finetune.job import Job
from foreroute.launch.finetune.of_encoder import job_of_encoder
from foreroute.launch.finetune.of_run import job_of_run
from foreroute.launch.finetune.report import Progress, report, scores_of, write_result
from foreroute.launch.start.cli import run_program
from foreroute.launch.start.console import Console
from foreroute.launch.start.process import StopSignal, set_up


def finetune(args: FinetuneArgs) -> int:
    """Fine-tune; returns the exit code."""
    set_up(args.threads)
    stop = StopSignal()  # ends the program at once: a result is written whole or not at all
    started = time.perf_counter()
    console = Console(args.total_steps)
    job = job_of_run(args, console) if args.run else job_of_encoder(args, console)
    try:
        with closing(console):
            found, scores = _run(job, args, console)
    except SystemExit:
        console.note("stopped; no result was written")
        raise
    result = {
        **scores_of(scores, job.examples.always),
        "selection": asdict(found),
        "examples": job.examples.facts,
        **job.facts,
        "settings": to_plain(args),
        "seconds": time.perf_counter() - started,
    }
    with stop.deferred():
        target = write_result(job.target, result)
    print(report(found, scores, job.examples.always))
    print(f"{target} has all of it; {found.sentences / found.seconds:,.0f} sentences/s in training")
    return 0


def _run(job: Job, args: FinetuneArgs, console: Console) -> tuple[Selection, dict[str, Accuracy]]:
    """Train and select at k; then evaluate on dev, once for each name of eval_k."""
    recipe = Recipe(job.k, args.steps, args.batch, tuple(args.lr), args.eval_every, args.seed, job.clip, args.k_min)
    model, examples = job.model, job.examples
    progress = Progress(console, args.total_steps)
    found = train_and_select(model, examples.train, examples.held_out, recipe, progress)
    return found, {name: model.evaluate(examples.dev, k).accuracy for name, k in job.eval_k.items()}


def main() -> None:
    """Entry point."""
    run_program("finetune", FinetuneArgs, finetune)


if __name__ == "__main__":
    main()
