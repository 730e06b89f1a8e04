"""The folder of a run, runs/<name>, with its files; another run never overwrites anything in it.

config.yaml (resolved), facts.json (launch/runs/facts.py), state.json, metrics.jsonl, checkpoints/, loss.png,
slimming.png, summary.json; tokenizer.json or words.txt, where text is cut into such symbols; trace/ of profiled steps.
A finished run that is trained further keeps its first summary as summary-STEPS.json.

state.json holds the state of the run, for whoever starts it again: {"state": "stopped", "step": 400}. `running`: it
runs, or it was killed; `stopped`: by SIGTERM or Ctrl-C; `failed`: it ended with an error; `complete`: nothing is left
to do.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, Protocol

from foreroute.engine.config import Config, TrainConfig, to_plain
from foreroute.engine.config.option import by_full_name, option, option_names
from foreroute.engine.errors import UserError, require
from foreroute.engine.parallel.world import World, together
from foreroute.engine.sealed_files import replacing
from foreroute.launch.start.config_files import config_of, read_config, write_config

CONFIG, LOCK, STATE = "config.yaml", ".lock", "state.json"
SUMMARY, FACTS, TOKENIZER, ANALYSIS = "summary.json", "facts.json", "tokenizer.json", "analysis.json"
_NEW_CONFIG = f".{CONFIG}.new"
_BEFORE_A_RUN = _NEW_CONFIG, LOCK  # files of a run that was killed before it claimed its folder
MEASURED = "kernels.masked_from_k"
"""The option that a run sets by a measurement at its start (engine/train/resolve.py)."""

TEXT_PLACES = option_names(corpus=("path", "valid_path", "test_path", "tokenizer", "cache_dir"))
"""Options that say where the text lies, which each machine may have in another place."""
_PLACES = TEXT_PLACES + option_names(
    data=("prefetch",),
    ngram_tables=("place",),
    train=("name", "runs_dir", "resume", "threads", "keep", "save_every", "save_minutes", "log_every", "peak_tflops"),
)
FREE = (
    *_PLACES,
    *option_names(
        train=("steps", "valid_every", "valid_symbols", "zero_stage", "offload", "accumulation", "recompute")
    ),
    *("eval", "wandb", "profile", "parallel"),
)
"""Options, or whole sections, that may differ when a run is resumed.

They change where files lie (the text is compared by its sha256), what is written and shown, or the layout of ranks. A
change of layout alters results only by floating-point rounding; Trainer.resume reports anything more. Another
train.steps is another end of the run, which launch/runs/lengths.py and facts.json describe.
"""
OF_MACHINE = (
    *_PLACES,
    *option_names(profile=("steps", "operators"), wandb=("mode", "project", "group", "job_type", "tags", "notes")),
    MEASURED,
)
"""Options in which runs of one experiment may differ: where and how the same steps are computed."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """An opened run folder, locked by rank 0 against other runs until `close`."""

    path: Path
    earlier: Config | None  # what the folder's run was started with; None for a new run
    lock: IO[str] | None  # of rank 0

    @property
    def resuming(self) -> bool:
        """The folder already held this run."""
        return self.earlier is not None

    def close(self) -> None:
        """Release the lock."""
        if self.lock is not None:
            self.lock.close()

    def refuse_changes(self, now: Mapping[str, Mapping[str, Any]]) -> None:
        """Check that a resumed run keeps its options.

        Raises:
            UserError: an option that must stay has another value than in the folder's run.
        """
        before = by_full_name(now if self.earlier is None else to_plain(self.earlier))
        for name, value in by_full_name(now).items():
            if value != before[name] and not {name.partition(".")[0], name} & set(FREE):
                raise UserError(
                    f"{name}={value}: the run in {self.path} was started with {before[name]}; a resumed run keeps its"
                    " options"
                )

    def claim(self, config: Config, vocab: Mapping[str, bytes] | None = None) -> None:
        """Write the resolved configuration: from now on the folder holds this run. Only rank 0 writes.

        Args:
            vocab: files of its vocabulary, by name.
        """
        if self.lock is None:
            return
        for name, content in (vocab or {}).items():
            (self.path / name).write_bytes(content)
        new = self.path / _NEW_CONFIG
        write_config(config, new)
        new.replace(self.path / CONFIG)
        summary = self.path / SUMMARY
        if self.earlier and self.earlier.train.steps != config.train.steps and summary.exists():
            steps = json.loads(summary.read_text())["steps"]
            summary.replace(self.path / f"summary-{steps}.json")

    def summary_of(self, step: int) -> dict[str, Any] | None:
        """Return the summary of the run at this step, if there is one."""
        file = self.path / SUMMARY
        if not file.exists():
            return None
        found: dict[str, Any] = json.loads(file.read_text())
        return found if found["steps"] == step else None

    @contextmanager
    def left_unless_claimed(self) -> Iterator[None]:
        """Delete a folder that holds nothing if the start is refused before it claims the folder."""
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

    @contextmanager
    def recorded(self, run: "Steps") -> Iterator["RunState"]:
        """Train and evaluate in the block and keep state.json; the block calls `complete` at its end."""
        state = RunState()
        self.record("running", run.step)
        try:
            yield state
        except SystemExit:  # a signal outside the training loop
            if self.lock is not None and run.step > 0:
                print(f"stopped after step {run.step}, which is saved; train.resume=true evaluates it")
            raise
        except BaseException:
            state.name = "failed"
            raise
        finally:
            self.record(state.name, run.step)


class Steps(Protocol):
    """A run that counts its steps."""

    step: int  # finished ones


@dataclass(slots=True)
class RunState:
    """The end of a run, unless an error ends it."""

    name: str = "stopped"

    def complete(self) -> None:
        """Note that nothing is left to do."""
        self.name = "complete"


@dataclass
class TextArgs:
    """Place of the run's text; None means where it was in training."""

    path: Any = option(None, "The file that the run was trained on, or whatever its corpus.path named.")
    valid_path: Any = option(None, "Of the valid split, where it has files of its own.")
    test_path: Any = option(None, "Of the test split, where it has files of its own.")
    tokenizer: str | None = option(
        None, "The tokenizer.json of corpus.tokens=file; None takes the copy in the run's folder."
    )
    cache_dir: str | None = option(None, "Folder of prepared corpora and tables; safe to delete.")


def read_run(folder: Path, text: TextArgs) -> Config:
    """Read the configuration of a trained run, with the present place of its text.

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
    """Write a JSON file atomically: it is whole, or it is as before."""
    with replacing(file) as new:
        new.write_text(json.dumps(value, indent=2) + "\n")


def open_run(train: TrainConfig, world: World | None = None) -> RunFolder:
    """Open and lock the run's folder; `claim` it once everything else is known good.

    Rank 0 opens it, and tells the other ranks which run it holds.

    Args:
        world: the ranks; one alone by default.

    Raises:
        UserError: the folder holds a run and train.resume is false, or something else, or another process is using it.
    """
    world = world or World()
    path = Path(train.runs_dir) / train.name
    opened = None
    with together(world.cpu_group, rank_0_first=True):
        if world.first:
            opened = _open(train, path)
    found = world.cpu_group.broadcast(opened and opened.earlier and to_plain(opened.earlier))
    with together(world.cpu_group):
        require(
            (path / LOCK).exists(),
            f"train.runs_dir={train.runs_dir}: {path}, which rank 0 has made, is not here: all machines must share it",
        )
    return opened or RunFolder(path, config_of(found) if found else None, None)


def _open(train: TrainConfig, path: Path) -> RunFolder:
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(path)
    except OSError as error:
        raise UserError(
            f"train.runs_dir={train.runs_dir}: {path} cannot be made or written: {error.strerror}"
        ) from error
    try:
        return RunFolder(path, _earlier(train, path), lock)
    except BaseException:
        _leave(path, lock)
        raise


def _earlier(train: TrainConfig, path: Path) -> Config | None:
    """Return the configuration of the run that the folder holds."""
    if (path / CONFIG).exists():
        require(
            train.resume,
            f"train.name={train.name}: {path} already holds a run; take another train.name, "
            "or train.resume=true to go on with it",
        )
        return read_config(path / CONFIG)
    foreign = sorted(entry.name for entry in path.iterdir() if entry.name not in _BEFORE_A_RUN)
    require(not foreign, f"train.name={train.name}: {path} holds {', '.join(foreign[:3])} and is no run folder")
    return None


def _leave(path: Path, lock: IO[str]) -> None:
    """Release the lock of a folder; delete the folder if it has nothing else."""
    if {entry.name for entry in path.iterdir()} <= set(_BEFORE_A_RUN):
        with suppress(OSError):
            for name in _BEFORE_A_RUN:
                (path / name).unlink(missing_ok=True)
            path.rmdir()
    lock.close()


def lock_folder(path: Path) -> IO[str]:
    """Lock the folder until the file is closed or the process ends, however it ends.

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
