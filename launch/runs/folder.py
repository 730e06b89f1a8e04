"""The folder of a run, runs/<name>: what is in it, and the rule that nothing in it is ever overwritten by another run.

config.yaml (resolved), facts.json (launch/runs/facts.py), state.json, metrics.jsonl, checkpoints/, loss.png,
slimming.png, summary.json; tokenizer.json or words.txt, where text is cut into such symbols; trace/ of profiled steps.
A finished run that is trained further keeps its first summary as summary-STEPS.json.

state.json says how the run stands, for whoever starts it again: {"state": "stopped", "step": 400}. `running`: it is, or
it was killed; `stopped`: by SIGTERM or Ctrl-C; `failed`: it ended with a line or a traceback; `complete`: nothing is
left to do.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch

from foreroute.engine.config import Backend, Config, to_plain
from foreroute.engine.config.option import option
from foreroute.engine.errors import UserError, require
from foreroute.engine.parallel.world import World, together
from foreroute.engine.train.resolve import resolve
from foreroute.launch.start.config_files import config_of, read_config, write_config

CONFIG, LOCK, STATE = "config.yaml", ".lock", "state.json"
SUMMARY, FACTS, TOKENIZER = "summary.json", "facts.json", "tokenizer.json"
MEASURED = "kernels.masked_from_k"
"""The option that a run sets itself, by a measurement at its start (engine/train/resolve.py)."""

# Options that may differ when a run is resumed: they change where things lie (the text is compared by its sha256), what
# is written and shown, or on which ranks and how the same steps are computed, which is seen in the rounding alone (and
# in what Trainer.resume then says). Another train.steps is another end of the run, which launch/runs/lengths.py and
# facts.json tell of.
FREE = (
    "train.steps",
    "train.resume",
    "train.log_every",
    "train.valid_every",
    "train.valid_symbols",
    "train.save_every",
    "train.save_minutes",
    "train.keep",
    "train.threads",
    "train.peak_tflops",
    "train.runs_dir",
    "train.name",
    "data.prefetch",
    "corpus.path",
    "corpus.valid_path",
    "corpus.test_path",
    "corpus.tokenizer",
    "corpus.cache_dir",
    "eval",
    "wandb",
    "profile",
    "parallel",
    "train.zero_stage",
    "train.offload",
    "train.accumulation",
    "train.recompute",
)
OF_MACHINE = (
    "corpus.path",
    "corpus.valid_path",
    "corpus.test_path",
    "corpus.tokenizer",
    "corpus.cache_dir",
    "train.name",
    "train.runs_dir",
    "train.resume",
    "train.threads",
    "train.keep",
    "train.save_every",
    "train.save_minutes",
    "train.log_every",
    "data.prefetch",
    "wandb.mode",
    "wandb.project",
    "wandb.group",
    "wandb.job_type",
    "wandb.tags",
    "wandb.notes",
    "train.peak_tflops",
    "profile.steps",
    "profile.operators",
    MEASURED,
)
"""Options in which runs differ without being other experiments: where and how the same steps are computed."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """An opened run folder, locked by rank 0 against other runs until `close`."""

    path: Path
    config: Config  # resolved
    earlier: Config | None  # what the folder's run was started with; None for a new run
    lock: IO[str] | None  # of rank 0

    @property
    def resuming(self) -> bool:
        """The folder already held this run."""
        return self.earlier is not None

    def close(self) -> None:
        """Give up the lock."""
        if self.lock is not None:
            self.lock.close()

    def claim(self, vocab: Mapping[str, bytes] | None = None) -> None:
        """Write the resolved configuration: from now on the folder holds this run. Only rank 0 writes.

        Args:
            vocab: files of its vocabulary, by name.
        """
        if self.lock is not None:
            for name, content in (vocab or {}).items():
                (self.path / name).write_bytes(content)
            new = self.path / f".{CONFIG}.new"
            write_config(self.config, new)
            new.replace(self.path / CONFIG)
            self._keep_summary()

    def _keep_summary(self) -> None:
        """Put the summary of a run that was finished, and is trained further, aside."""
        file = self.path / SUMMARY
        if self.earlier and self.earlier.train.steps != self.config.train.steps and file.exists():
            steps = json.loads(file.read_text())["steps"]
            file.replace(self.path / f"summary-{steps}.json")

    def summary_of(self, step: int) -> dict[str, Any] | None:
        """Give the summary of the run as it was at this step, if there is one."""
        file = self.path / SUMMARY
        if not file.exists():
            return None
        found: dict[str, Any] = json.loads(file.read_text())
        return found if found["steps"] == step else None

    @contextmanager
    def left_unless_claimed(self) -> Iterator[None]:
        """Leave no folder behind that holds nothing, when the start is refused before it claims the folder."""
        try:
            yield
        except BaseException:
            if self.lock is not None and not self.resuming:
                _leave(self.path, self.lock)
            raise

    def record(self, state: str, step: int) -> None:
        """Write state.json, if the disk allows it; only rank 0 does."""
        if self.lock is None:
            return
        with suppress(OSError):
            write_json(self.path / STATE, {"state": state, "step": step})

    def recorded(self, act: Callable[[], int], step: Callable[[], int]) -> int:
        """Train and evaluate by act(), with state.json kept; gives its exit code, which is 0 for a complete run.

        Args:
            step: gives the number of finished steps.
        """
        self.record("running", step())
        state = "failed"
        try:
            code = act()
            state = "stopped" if code else "complete"
            return code
        except SystemExit:  # a signal outside the training loop
            state = "stopped"
            if self.lock is not None and step() > 0:
                print(f"stopped behind step {step()}, which is saved; train.resume=true evaluates it")
            raise
        finally:
            self.record(state, step())


@dataclass
class TextArgs:
    """Where the run's text is now; None means where it was in training."""

    path: Any = option(None, "The file that the run was trained on, or whatever its corpus.path named.")
    valid_path: Any = option(None, "Of the valid split, where it has files of its own.")
    test_path: Any = option(None, "Of the test split, where it has files of its own.")
    tokenizer: str | None = option(
        None, "The tokenizer.json of corpus.tokens=file; None takes the copy in the run's folder."
    )
    cache_dir: str | None = option(None, "Folder of prepared corpora and tables; safe to delete.")


def read_run(folder: Path, text: TextArgs) -> Config:
    """Read the configuration of a trained run, with its text where it is now.

    Raises:
        UserError: there is none, it does not fit this version, or its corpus takes no path.
    """
    config = read_config(folder / CONFIG)
    moved = {name: value for name, value in asdict(text).items() if value is not None}
    kept = folder / TOKENIZER
    if config.corpus.tokenizer is not None and kept.exists():
        moved = {"tokenizer": str(kept), **moved}
    return replace(config, corpus=replace(config.corpus, **moved))


def write_json(file: Path, value: Any) -> None:
    """Write a JSON file at once: it is whole, or it is as it was."""
    new = file.with_name(f".{file.name}.new")
    new.write_text(json.dumps(value, indent=2) + "\n")
    new.replace(file)


def open_run(config: Config, world: World | None = None) -> RunFolder:
    """Check and lock the run's folder, and resolve the configuration; `claim` it once everything else is known good.

    Rank 0 does so, and measures what is chosen by measurement; the other ranks are told.

    Args:
        world: the ranks; one alone by default.

    Raises:
        UserError: the folder holds a run and train.resume is false, or a run of another configuration, or something
            else, or another process is using it.
    """
    world = world or World()
    cpu_group, device = world.cpu_group, world.device
    opened = together(cpu_group, lambda: _open(config, device) if world.first else None, rank_0_first=True)
    if cpu_group.ranks == 1:
        assert opened is not None
        return opened
    told = None
    if opened is not None:
        told = [to_plain(opened.config), opened.earlier and to_plain(opened.earlier)]
    now, earlier = cpu_group.broadcast(told)
    path = Path(config.train.runs_dir) / config.train.name
    together(
        cpu_group,
        lambda: require(
            (path / LOCK).exists(),
            f"train.runs_dir={config.train.runs_dir}: {path}, which rank 0 has made, is not here: all machines must"
            " share it",
        ),
    )
    if opened is not None:
        return opened
    return RunFolder(path, config_of(now), config_of(earlier) if earlier else None, None)


def _open(config: Config, device: torch.device) -> RunFolder:
    path = Path(config.train.runs_dir) / config.train.name
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(path)
    except OSError as error:
        raise UserError(
            f"train.runs_dir={config.train.runs_dir}: {path} cannot be made or written: {error.strerror}"
        ) from error
    try:
        return _read_or_new(config, device, path, lock)
    except BaseException:
        _leave(path, lock)
        raise


def _leave(path: Path, lock: IO[str]) -> None:
    """Give up the lock of a folder; delete the folder, if it has nothing else."""
    held = {entry.name for entry in path.iterdir()} <= {LOCK, f".{CONFIG}.new"}
    if held:
        with suppress(OSError):
            for name in (f".{CONFIG}.new", LOCK):
                (path / name).unlink(missing_ok=True)
            path.rmdir()
    lock.close()


def _read_or_new(config: Config, device: torch.device, path: Path, lock: IO[str]) -> RunFolder:
    if not (path / CONFIG).exists():
        known = (LOCK, f".{CONFIG}.new")  # also of a run that was killed early
        foreign = sorted(entry.name for entry in path.iterdir() if entry.name not in known)
        require(
            not foreign, f"train.name={config.train.name}: {path} holds {', '.join(foreign[:3])} and is no run folder"
        )
        return RunFolder(path, resolve(config, device), None, lock)
    require(
        config.train.resume,
        f"train.name={config.train.name}: {path} already holds a run; take another train.name, "
        "or train.resume=true to go on with it",
    )
    earlier = read_config(path / CONFIG)
    kernels = config.kernels
    if kernels.masked_from_k is None:
        kernels = replace(kernels, masked_from_k=earlier.kernels.masked_from_k)
    if kernels.backend is Backend.auto:
        kernels = replace(kernels, backend=earlier.kernels.backend)
    config = resolve(replace(config, kernels=kernels), device)
    _refuse_changes(to_plain(earlier), to_plain(config), path)
    return RunFolder(path, config, earlier, lock)


def lock_folder(path: Path) -> IO[str]:
    """Take the folder's lock; it is released when the file is closed or the process ends, however it ends.

    Raises:
        UserError: another process has it.
    """
    with ExitStack() as unless_locked:
        file = unless_locked.enter_context((path / LOCK).open("w", encoding="utf-8"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path} is in use by another process") from None
        except OSError as error:  # such as Lustre mounted without flock
            raise UserError(f"{path} cannot be locked ({error.strerror}): needs a file system with flock") from error
        if not os.path.exists(path / LOCK) or not os.path.samestat(os.fstat(file.fileno()), os.stat(path / LOCK)):
            raise UserError(f"{path} is in use by another process, which is leaving it: start again")
        unless_locked.pop_all()
    return file


def _refuse_changes(earlier: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    for section, options in now.items():
        for name, value in options.items():
            before = earlier[section][name]
            if value != before and section not in FREE and f"{section}.{name}" not in FREE:
                raise UserError(
                    f"{section}.{name}={value}: the run in {path} was started with {before}; "
                    "a resumed run keeps its options"
                )


ANALYSIS = "analysis.json"
