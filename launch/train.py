"""Train, evaluate at every k, and write a run folder: `python -m launch.train experiment=NAME [SECTION.OPTION=VALUE]`.

`train` reads from top to bottom as a run goes: configuration, corpus, folder, tables, Trainer
(engine/train/trainer.py), slimming curve, summary.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from signal import SIGTERM
from typing import Any

from foreroute.engine.certificate.check import Check, fits, fits_tables, fits_text
from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.record import Written, read
from foreroute.engine.config import Backend, Config, Split, WandbMode, to_plain
from foreroute.engine.config.option import by_full_name, option
from foreroute.engine.config.unused_options import rules, unused
from foreroute.engine.data.corpus import PreparedCorpus, prepare
from foreroute.engine.evaluation.held_out import Evaluation, slimming_curve
from foreroute.engine.metrics.writer import Metrics
from foreroute.engine.model.build import build_routers
from foreroute.engine.parallel.world import agree, together
from foreroute.engine.routing.methods import idle_options, method_of, option_uses
from foreroute.engine.train.resolve import resolve
from foreroute.engine.train.trainer import Trainer
from foreroute.launch.runs.facts import write_facts
from foreroute.launch.runs.folder import TEXT_PLACES, RunFolder, open_run
from foreroute.launch.runs.lengths import other_length
from foreroute.launch.runs.summary import final_numbers, result_table, summarise
from foreroute.launch.runs.sweep_table import report_sweep
from foreroute.launch.start.cli import run_program
from foreroute.launch.start.console import Console, Stages, lasting
from foreroute.launch.start.meeting import connected
from foreroute.launch.start.options import command_option, given_options, in_sweep, job_name
from foreroute.launch.start.process import StopSignal, leaving_at_once, set_up


@dataclass
class TrainArgs(Config):
    """Options: a run's configuration, and the certificate that it is held to."""

    certificate: str | None = option(
        None,
        "What launch.certify wrote, the folder or its certificate.json: every step that it counted must move and "
        "compute the same rows and bytes, or the run ends. No part of the run: a resumed run may take one or drop "
        "it.",
    )


def train(args: TrainArgs) -> int:
    """Run a configuration on this rank; returns the exit code."""
    config = _named_in_sweep(args)
    set_up(config.train.threads)
    stop = StopSignal()
    with lasting(), connected(config.parallel, _options(to_plain(config))) as world, ExitStack() as until_end:
        ranks, console = world.cpu_group, Console(config.train.steps, enabled=world.first)

        # read what the run depends on
        with together(ranks):
            config.streams_per_micro_batch(world.mesh.world)  # refused before any text is read
            for section in config.expert_sections:
                if method_of(section) is not None:
                    world.mesh.local_experts(section.experts)
            certificate = None if args.certificate is None else read(Path(args.certificate))
            if certificate is not None:
                fits(certificate, Layout(config, certificate.placement), world.mesh.world)
            if world.first:
                _check_wandb(config.wandb.mode)
        with together(ranks, rank_0_first=True):
            corpus = prepare(config.corpus, console.note)
        agree(ranks, _facts(corpus, certificate))
        with together(ranks):
            if certificate is not None:
                fits_text(certificate, corpus.sha256)

        run = until_end.enter_context(closing(open_run(config.train, world)))
        with run.left_unless_claimed():
            # resolve, build, resume
            config = resolve(config, world, run.earlier.kernels if run.earlier else None)
            with together(ranks):
                run.refuse_changes(to_plain(config))
            if config.train.resume and not run.resuming:
                console.note(f"{run.path}: no run to resume, a new one starts")
            for line in corpus.notes:
                console.note(line)
            with together(ranks, rank_0_first=True):
                routers = build_routers(config, corpus, world.mesh)
            with together(ranks, watchdog=world.watchdog):
                trainer = Trainer(config, corpus, routers, run.path, console, world)
            if run.earlier:
                trainer.resume()
                if config.train.steps != run.earlier.train.steps:
                    before, now = run.earlier.train.steps, config.train.steps
                    console.note(other_length(config.optim, config.schedule, trainer.step, before=before, now=now))
            if _is_complete(run, trainer):
                return 0
            with together(ranks):
                check = _check(certificate, trainer)
            run.claim(config, corpus.vocab.files())

        with run.recorded(trainer) as state:
            _describe(console, trainer)
            if check is not None:
                console.note(f"held to {check.written.path}: {check.written.scope}")
            with together(ranks):
                metrics = _open_metrics(run, trainer, check, console.note)
            with metrics or nullcontext():
                # train
                with closing(console), stop.deferred():
                    trained = trainer.run(metrics, stop, [] if check is None else [check])
                stopped = not trained or (stop() and ranks.ranks == 1)
                if stopped:
                    console.note(f"stopped at step {trainer.step}; train.resume=true goes on from there")
                else:
                    if check is not None:
                        console.note(f"{check.steps:,} steps were as certified")
                    # evaluate, summarise
                    with closing(Stages(enabled=world.first)) as progress:
                        curve = _evaluate(trainer, progress)
                        with together(ranks):
                            summary = summarise(run, trainer, curve, progress) if world.first else None
                    if summary is not None:
                        _show(run, summary, metrics)
            ranks.barrier()  # rank 0 may have waited long for W&B
            if not stopped:
                state.complete()
                return 0
        return stop.exit_code if stop() else 128 + SIGTERM  # of another rank


def _named_in_sweep(args: TrainArgs) -> Config:
    """Name a job of a sweep after what varies, and group the sweep's runs in W&B."""
    config = args.alone()
    name, group = config.train.name, config.wandb.group
    if in_sweep() and group is None:
        group = name
    return replace(config, train=replace(config.train, name=job_name(name)), wandb=replace(config.wandb, group=group))


def _facts(corpus: PreparedCorpus, certificate: Written | None) -> dict[str, Any]:
    """Return the facts that must be equal on all ranks besides the options."""
    return {
        "the text (its sha256)": corpus.sha256,
        "the vocabulary (its sha256)": corpus.vocab.fingerprint,
        "the certificate (its arrays' sha256)": certificate and certificate.facts["arrays_sha256"],
    }


def _is_complete(run: RunFolder, trainer: Trainer) -> bool:
    """Return whether a resumed run is complete; if so, show its results."""
    config, world = trainer.config, trainer.world
    if run.earlier is None or run.earlier.eval != config.eval or trainer.step != config.train.steps:
        return False
    summary = world.cpu_group.broadcast(run.summary_of(trainer.step))
    if summary is None:
        return False
    if world.first:
        print(result_table(summary))
        print(
            f"{run.path} is complete; python -m launch.evaluate {command_option('run', run.path)} measures"
            " it again, train.steps=STEPS train.resume=true trains it further"
        )
    run.record("complete", trainer.step)
    return True


def _check_wandb(mode: WandbMode) -> None:
    if mode is WandbMode.online:
        from foreroute.engine.metrics.wandb_run import check_key

        check_key(mode)


def _check(written: Written | None, trainer: Trainer) -> Check | None:
    """Hold the trainer's model, with the tables that it trains with, to a certificate."""
    if written is None:
        return None
    fits_tables(written, trainer.config.train.seed, trainer.routers or [], trainer.model.table_keys)
    return Check(written, trainer.model, trainer.world.mesh.rank)


def _options(plain: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return every option on which the ranks must agree, by name; each machine may have the text in another place."""
    return {name: value for name, value in by_full_name(plain).items() if name not in TEXT_PLACES}


def _open_metrics(run: RunFolder, trainer: Trainer, check: Check | None, note: Callable[[str], None]) -> Metrics | None:
    """Open the run's outputs; rank 0 alone has them."""
    if not trainer.world.first:
        return None
    config = trainer.config
    facts = write_facts(trainer, None if check is None else check.written, resuming=run.resuming)
    return Metrics(
        run.path,
        config.wandb,
        name=config.train.name,
        config_plain={**to_plain(config), "facts": facts},
        resume_step=trainer.step if run.resuming else None,
        note=note,
    )


def _describe(console: Console, trainer: Trainer) -> None:
    config, corpus = trainer.config, trainer.corpus
    mesh = trainer.world.mesh
    sections = config.model, config.moe
    found = rules(config, option_uses(*sections), idle_options(*sections))
    for name, reason in unused(found, given_options()).items():
        console.note(f"{name} has no effect: {reason}")
    if mesh.world > 1:
        console.note(
            f"ranks: {mesh.world}, in expert groups of {mesh.ep_size}; ZeRO stage {config.train.zero_stage}, "
            f"{config.streams_per_micro_batch(mesh.world)} streams per micro-batch on each"
        )
    train_symbols = len(corpus.split(Split.train))
    console.note(
        f"corpus {config.corpus.name.name}: {len(corpus.ids):,} symbols ({config.corpus.tokens.name}), "
        f"sha256 {corpus.sha256[:16]}..., {train_symbols:,} to train on"
    )
    console.note(
        f"model: {config.model.layers} layers, {trainer.parameters:,} parameters, router {config.moe.router}; "
        f"{config.symbols_per_step:,} symbols per step, {config.train.steps:,} steps, "
        f"{config.train.steps / trainer.streams.segments_per_epoch:.2f} passes over the text "
        f"(ragged tail of {trainer.streams.dropped_symbols} symbols dropped)"
    )
    if not config.moe.dense:
        first = config.kernels.masked_from_k or config.moe.experts + 1
        masked = config.kernels.backend is Backend.cpu and first <= config.moe.experts
        how = f", masked products from k={first} on" if masked else ""
        console.note(f"experts: backend {config.kernels.backend.value}{how}")


def _evaluate(trainer: Trainer, progress: Stages) -> dict[str, Evaluation]:
    """Evaluate at each k; rank 0 compares the results with counting, and the other ranks wait for it."""
    config, world = trainer.config, trainer.world
    if world.first:
        print(f"evaluating the {config.eval.split.name} split ...", flush=True)
    world.watchdog.at("the evaluation")
    curve = slimming_curve(trainer.run_model, world, progress)
    world.watchdog.at("the summary")
    return curve


def _show(run: RunFolder, summary: dict[str, Any], metrics: Metrics | None) -> None:
    """Show a summary in W&B and on the console."""
    if metrics is not None:
        metrics.summarise(final_numbers(summary))
    print(result_table(summary))
    print(f"{run.path}: config.yaml facts.json metrics.jsonl checkpoints/ loss.png slimming.png summary.json")
    print(f"python -m launch.report {command_option('run', run.path)} makes a page of it")


def main() -> None:
    """Entry point."""
    run_program("train", TrainArgs, train, many_ranks=True, report_sweep=report_sweep)


if __name__ == "__main__":
    with leaving_at_once():
        main()
