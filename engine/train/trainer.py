"""The training loop: steps, logged metrics, validation, checkpoints, and a clean stop.

The Trainer owns the run's state (engine, loader, memory, counters). It reports through a Reporter and prints nothing.
A requested stop (Ctrl-C, SIGTERM) takes effect between two steps, after a checkpoint. On a GPU a step's numbers are
read while the next step runs, and all of them before a line, a validation or a checkpoint.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from foreroute.engine.checkpoint import save_load as checkpoint
from foreroute.engine.checkpoint.files import step_of
from foreroute.engine.config import Config, EvalConfig, ScheduleConfig, Split, to_plain
from foreroute.engine.data.corpus import PreparedCorpus
from foreroute.engine.data.loader import PlannedLoader
from foreroute.engine.data.plan_agreement import Agreement
from foreroute.engine.data.planned_batches import TrainingBatches
from foreroute.engine.data.streams import Streams
from foreroute.engine.data.tokens.build import same_vocab
from foreroute.engine.errors import RunFailed, UserError, everywhere, require
from foreroute.engine.evaluation.held_out import evaluate
from foreroute.engine.metrics.log_interval import Values, Window
from foreroute.engine.metrics.names import JSONL, read_lines
from foreroute.engine.metrics.peak_flops import peak_of
from foreroute.engine.metrics.step_meter import StepMeter
from foreroute.engine.metrics.step_result import StepResult
from foreroute.engine.metrics.stragglers import StragglerDetector
from foreroute.engine.metrics.writer import Metrics
from foreroute.engine.model.adaptive import clusters, target_shares
from foreroute.engine.model.build import RunModel, build_model, fill_signatures, restore_routers, router_states
from foreroute.engine.model.flops import Arithmetic
from foreroute.engine.model.transformer_xl import Memory
from foreroute.engine.optim.deepspeed_engine import start
from foreroute.engine.parallel.world import World
from foreroute.engine.profiling.profiler import Profiler
from foreroute.engine.routing.hashing import hash64
from foreroute.engine.routing.planned_router import PlannedRouter, check_use
from foreroute.engine.tracing import span
from foreroute.engine.train.run_state import drops_out, join_memory, not_in_rounding_alone
from foreroute.engine.train.step import Observer, StepsUnderWay, read, train_step


class Reporter(Protocol):
    """Shows a person the progress of a run."""

    def note(self, line: str) -> None:
        """Show a line."""

    def step(self, step: int) -> None:
        """Show the number of finished steps."""

    def metrics(self, step: int, values: Mapping[str, Any], seconds_left: float) -> None:
        """Show the metrics of a logged step."""


def _uses(schedule: ScheduleConfig, evaluation: EvalConfig, valid_every: int) -> list[tuple[Split, int]]:
    """List the splits that a run's planned routers route, and with how many experts at the most."""
    found = [(Split.train, schedule.k_max), (evaluation.split, max(evaluation.k, default=1))]
    return [*found, (Split.valid, schedule.k_max)] if valid_every else found


class _StopAsked(Exception):
    """A stop was requested during a validation."""


class Trainer:
    """One rank's part of a run.

    Args:
        config: resolved (kernels.masked_from_k is set).
        routers: planned ones, for this rank's place; None for live routers and dense.
        folder: the run folder; checkpoints go to folder/checkpoints.
        world: the ranks; one alone by default.
    """

    def __init__(
        self,
        config: Config,
        corpus: PreparedCorpus,
        routers: list[PlannedRouter] | None,
        folder: Path,
        reporter: Reporter,
        world: World | None = None,
    ) -> None:
        self.config, self.corpus = config, corpus
        self.world = world or World()
        self.folder, self.reporter = folder, reporter
        data, starts = config.data, corpus.document_starts(Split.train)
        require(
            not data.reset_memory or bool(starts[-1:].any()),
            "data.reset_memory=true: needs a text whose documents are known: several files, JSON lines, or"
            " corpus.document_end",
        )
        for split, k in _uses(config.schedule, config.eval, config.train.valid_every):
            check_use(routers, split, k)
        ids = corpus.split(Split.train)
        self.streams = Streams(ids, data.streams, data.segment, config.context, data.start, starts)
        self.model = build_model(config, corpus.vocab.size)
        self.batches = TrainingBatches(
            config,
            self.streams,
            self.world.mesh,
            routers,
            self.world.planning_group,
            self.model.table_keys,
            self.world.planning,
        )
        fill_signatures(self.run_model)
        self.parameters = self.model.num_parameters  # of all ranks together
        shares = target_shares(corpus.split(Split.train), clusters(config.model, corpus.vocab.size))
        self.arithmetic = Arithmetic(config, corpus.vocab.size, self.parameters - self.model.num_unread, shares)
        self.peak = peak_of(config.train, config.kernels, self.world.device)
        self.engine = start(self.model, config, self.world.mesh)
        self.meter = StepMeter(self.model, self.engine.device, self.engine.comm, self.world)
        self.memory: list[Memory | None] = [None] * config.train.accumulation
        self.step = 0
        self._saved_at = time.monotonic()  # or began
        self._seed_generator()

    @property
    def routers(self) -> Sequence[PlannedRouter] | None:
        """Planned routers of all layers; None for live routers and dense."""
        return self.batches.routers

    @property
    def run_model(self) -> RunModel:
        """The model as it is now, for an evaluation."""
        return RunModel(self.config, self.corpus, self.model, self.routers)

    @property
    def checkpoints(self) -> Path:
        """Folder of this run's checkpoints."""
        return self.folder / "checkpoints"

    def resume(self) -> None:
        """Go on from the newest whole checkpoint, if there is one; damaged ones are named and skipped.

        Raises:
            UserError: on every rank: no checkpoint is whole or fits, the newest is beyond train.steps, or the text has
                changed.
        """
        try:
            self._resume()
        except UserError as error:
            everywhere(error)
            raise

    def _resume(self) -> None:
        cpu_group = self.world.cpu_group
        path, warnings = checkpoint.find_newest(self.checkpoints, cpu_group)
        for warning in warnings:
            self.reporter.note(warning)
        if path is None and warnings:
            raise UserError(f"{self.checkpoints}: no whole checkpoint is left; {warnings[0]}")
        if path is None:
            self.reporter.note("no checkpoint to resume from: starting at step 0")
            return
        manifest = checkpoint.read_manifest(path)
        trained_on = manifest["corpus_sha256"]
        if trained_on != self.corpus.sha256:
            raise UserError(
                f"{path}: trained on text with sha256 {trained_on[:16]}..., the corpus is now"
                f" {self.corpus.sha256[:16]}...; another train.name starts a new run"
            )
        require(
            same_vocab(manifest["symbols"], self.corpus.vocab),
            f"{path}: trained with another vocabulary than the corpus has now; another train.name starts a new run",
        )
        done, steps = step_of(path), self.config.train.steps
        if done > steps:
            raise UserError(f"train.steps={steps}: the run in {self.folder} is at step {done:,} already")
        state = checkpoint.load(path, self.engine, cpu_group=cpu_group, streams=self._own_streams())
        self.step = state.step
        # tables belong to the model: take the saved ones
        config = self.config
        vocab_size, mesh = self.corpus.vocab.size, self.world.mesh
        routers = restore_routers(config, state.tables, vocab_size, mesh, corpus=self.corpus)
        self.batches = replace(self.batches, routers=routers)
        self._restore_generators(state)
        if state.memory is not None:
            device, micros = self.engine.device, len(self.memory)
            parts = [layer.to(device).tensor_split(micros) for layer in state.memory]
            self.memory = [tuple(micro) for micro in zip(*parts, strict=True)]
        self.reporter.note(f"resumed at step {self.step} from {path}")
        accumulation = config.train.accumulation
        if differs := not_in_rounding_alone(manifest, mesh, config.model, config.moe, accumulation=accumulation):
            self.reporter.note(f"the checkpoint is of another layout of ranks and micro-batches: {', '.join(differs)}")
        elif self._on_gpu != (state.device_rng is not None) and drops_out(self.config.model):
            self.reporter.note("the checkpoint is of another kind of device: dropout draws new numbers")

    def save(self) -> Path:
        """Write a checkpoint of the present state."""
        self.world.watchdog.at(f"the checkpoint of step {self.step}")
        self._saved_at = time.monotonic()
        state = checkpoint.TrainingState(
            step=self.step,
            cursor=self.step,  # one segment of every stream per step
            rng=torch.get_rng_state(),
            device_rng=torch.cuda.get_rng_state(self.engine.device) if self._on_gpu else None,
            memory=join_memory(self.memory),
            stream_B=torch.tensor(self._own_streams()),
            tables=router_states(self.routers),
        )
        try:
            return checkpoint.save(
                self.checkpoints,
                self.engine,
                state,
                facts={
                    "config": to_plain(self.config),
                    "corpus_sha256": self.corpus.sha256,
                    "symbols": self.corpus.vocab.fingerprint,
                },
                keep=self.config.train.keep,
                cpu_group=self.world.cpu_group,
            )
        except OSError as error:  # the same on every rank
            failure = RunFailed(f"cannot write a checkpoint at step {self.step}: {error}")
            raise everywhere(failure) from error

    def run(self, metrics: Metrics | None, stop_asked: Callable[[], bool], observers: Sequence[Observer] = ()) -> bool:
        """Train until train.steps, or until stop_asked() says so; a checkpoint is written in both cases.

        Args:
            metrics: where numbers go; None on all ranks but the first.
            stop_asked: may differ between the ranks, which stop after the same step, on a GPU perhaps one step later.
            observers: of every step.

        Returns:
            True when all steps are done.

        Raises:
            RunFailed: the loss is not finite, an observer refuses a step, or a checkpoint cannot be written.
        """
        train, first, start = self.config.train, self.step, time.perf_counter()
        window = self._window()
        loader = self._loader()
        saved = first or -1  # a resumed run starts at its checkpoint
        alone = self.world.mesh.world == 1
        stopping = alone and stop_asked()
        slow, under_way = StragglerDetector(), StepsUnderWay(on_gpu=self._on_gpu)
        profiler = Profiler(self.config.profile, self.folder / "trace", self.world, self.reporter.note, done=first)
        try:
            if metrics is not None and alone and self._missed_validation():
                self._validate(metrics, window, stop_asked)
            while self.step < train.steps and not stopping:
                compiles = self.step == first  # kernels, perhaps
                self.world.watchdog.at(f"step {self.step}", timeouts=5 if compiles else 1)
                profiler.begin(self.step + 1)
                launched = train_step(
                    self.engine,
                    loader,
                    self.memory,
                    train=train,
                    optim=self.config.optim,
                    step=self.step,
                    meter=self.meter,
                    observers=observers,
                    stop_asked=stop_asked(),
                    save_asked=self._save_asked(),
                )
                under_way.add(launched)
                self.step += 1
                logs = self.step % train.log_every == 0 or self.step == train.steps
                validates = train.valid_every > 0 and self.step % train.valid_every == 0
                saves = train.save_every > 0 and self.step % train.save_every == 0
                stopping = alone and stop_asked()
                due = logs or validates or saves or stopping or profiler.in_step
                results = self._read(under_way, window, all_of_them=due)
                if any(result.save_asked or result.stop_asked for result in results):
                    results += self._read(under_way, window, all_of_them=True)
                profiler.end(self.step, [result.times for result in results])
                saves = saves or any(result.save_asked for result in results)
                stopping = stopping or any(result.stop_asked for result in results)
                self.reporter.step(self.step)
                if logs:
                    for line in slow.lines(window.own_ms_P()):
                        self.reporter.note(f"step {self.step}: {line}")
                    values = self._log(window, metrics)
                    elapsed = time.perf_counter() - start
                    left = elapsed / (self.step - first) * (train.steps - self.step)
                    self.reporter.metrics(self.step, values, left)
                if validates:
                    with span("validation"):
                        self._validate(metrics, window, stop_asked if alone else lambda: False)
                if saves:
                    with span("checkpoint"):
                        self.save()
                    saved = self.step
            profiler.close()
        except _StopAsked:
            pass
        except RunFailed as error:
            self.step -= len(under_way)  # finished steps
            together = error.everywhere or alone
            failure = RunFailed(f"{error}; {self._last_good()}" if together else str(error))
            failure.everywhere = error.everywhere
            raise failure from error
        finally:
            loader.close()
            profiler.leave()
        if window.begun:  # stopped between two lines
            self._log(window, metrics)
        if saved != self.step:
            self.save()
        return self.step >= train.steps

    def _read(self, under_way: StepsUnderWay, window: Window, *, all_of_them: bool) -> list[StepResult]:
        """Read the steps that have arrived; the next step tells the other ranks their times."""
        results = []
        for arrived in under_way.arrived(all_of_them=all_of_them):
            with window.timed():
                results.append(read(arrived))
                window.add(results[-1])
            self.meter.tell(results[-1].times)
        return results

    def _log(self, window: Window, metrics: Metrics | None) -> Values:
        """End the window after this step; write and return its numbers."""
        with window.timed():
            values = window.close(self.step)
            if metrics is not None:
                metrics.log(self.step, values)
        return values

    def _window(self) -> Window:
        return Window(
            self.arithmetic,
            ranks=self.world.mesh.world,
            device=self.world.device,
            peak=self.peak,
            flops=self.arithmetic.flops_before(self.step),
        )

    def _loader(self) -> PlannedLoader:
        config, world, tables = self.config, self.world, self.model.ngram_tables
        if tables is not None:
            tables.settle(restart=True)
        return PlannedLoader(
            self.batches,
            steps=range(self.step, config.train.steps),
            accumulation=config.train.accumulation,
            prefetch=config.data.prefetch,
            agreement=self._agreement() if world.mesh.world > 1 else None,
            device=self.engine.device,
            ahead=None if tables is None else tables.ahead,
        )

    def _agreement(self) -> Agreement:
        return Agreement(self.world.planning, self.world.mesh, self.routers, self.model.table_keys)

    def _own_streams(self) -> list[int]:
        """Return the global streams of this rank, micro-batch by micro-batch."""
        micros, rank = range(self.config.train.accumulation), self.world.mesh.rank
        return [stream for micro in micros for stream in self.batches.streams_of(rank, micro)]

    def _seed_generator(self) -> None:
        """Seed each rank's dropout outside the experts differently; all ranks built the same model."""
        mesh, seed = self.world.mesh, self.config.train.seed
        if mesh.world > 1 or self.step > 0:
            torch.manual_seed(hash64(seed, mesh.rank, self.step).item())

    def _restore_generators(self, state: checkpoint.TrainingState) -> None:
        """Restore the generators; seed new ones where another layout of ranks, or a CPU, saved the state."""
        if state.rng is None or (self._on_gpu and state.device_rng is None):
            self._seed_generator()
            return
        torch.set_rng_state(state.rng)
        if state.device_rng is not None and self._on_gpu:
            torch.cuda.set_rng_state(state.device_rng, self.engine.device)

    @property
    def _on_gpu(self) -> bool:
        return self.engine.device.type == "cuda"

    def _save_asked(self) -> bool:
        """Return whether the last checkpoint is older than train.save_minutes by this rank's clock."""
        minutes = self.config.train.save_minutes
        return minutes > 0 and time.monotonic() - self._saved_at >= 60 * minutes

    def _validate(self, metrics: Metrics | None, window: Window, stop_asked: Callable[[], bool]) -> None:
        self.world.watchdog.at(f"the validation at step {self.step}")

        def leave_if_asked(done: int, total: int) -> None:
            if stop_asked():
                raise _StopAsked

        found = evaluate(
            self.run_model,
            split=Split.valid,
            k=self.config.schedule.k_max,
            progress=leave_if_asked,
            world=self.world,
            max_symbols=self.config.train.valid_symbols,
        )
        k = self.config.schedule.k_max
        values = {"valid_loss": found.nats, "valid_bpc": found.bpc, "k": k, **window.progress(self.step)}
        if metrics is not None:
            with window.timed():
                metrics.log(self.step, values)
        self.reporter.note(f"step {self.step}: valid bpc {found.bpc:.4f}")

    def _missed_validation(self) -> bool:
        """Return whether the run was stopped in the validation of this step."""
        every, file = self.config.train.valid_every, self.folder / JSONL
        if not every or self.step == 0 or self.step % every or not file.exists():
            return False
        return not any(row["step"] == self.step and "valid_bpc" in row for row in read_lines(file))

    def _last_good(self) -> str:
        """Name the checkpoint that the run can resume from; a collective."""
        self.world.watchdog.at("the search for the last good checkpoint")
        path, _ = checkpoint.find_newest(self.checkpoints, self.world.cpu_group)
        return "no checkpoint was written yet" if path is None else f"the last good checkpoint is {path}"
