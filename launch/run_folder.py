"""The folder of a run, runs/<name>: what is in it, and the rule that nothing in it is ever overwritten by another run.

config.yaml (resolved), metrics.jsonl, checkpoints/, loss.png, slimming.png, summary.json.
"""

import fcntl
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch

from engine.config import Backend, Config, require, to_plain
from engine.errors import UserError
from engine.parallel.world import World, together
from engine.tuning import resolve
from launch.cli import config_of, read_config, write_config

CONFIG, LOCK = "config.yaml", ".lock"

# Options that may differ when a run is resumed: they change what is written and shown, or on which ranks and how the same
# steps are computed, which is seen in the rounding alone.
FREE = (
    "train.resume", "train.log_every", "train.valid_every", "train.save_every", "train.keep", "train.threads",
    "train.runs_dir", "data.prefetch", "corpus.cache_dir", "eval", "wandb",
    "parallel", "train.zero_stage", "train.offload", "train.accumulation", "train.recompute",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RunFolder:
    """An opened run folder; locked against other runs as long as rank 0's object lives."""

    path: Path
    config: Config  # resolved
    earlier: Config | None  # what the folder's run was started with; None for a new run
    lock: IO[str] | None  # of rank 0

    @property
    def resuming(self) -> bool:
        """The folder already held this run."""
        return self.earlier is not None

    def claim(self) -> None:
        """Write the resolved configuration: from now on the folder holds this run. Only rank 0 writes."""
        if self.lock is not None:
            write_config(self.config, self.path / CONFIG)


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
    host, device = world.host, world.device
    opened = together(
        host, lambda: _open(config, device) if world.first else None, rank_0_first=True
    )
    if host.ranks == 1:
        assert opened is not None
        return opened
    told = None
    if opened is not None:
        told = [to_plain(opened.config), opened.earlier and to_plain(opened.earlier)]
    now, earlier = host.broadcast(told)
    if opened is not None:
        return opened
    path = Path(config.train.runs_dir) / config.train.name
    return RunFolder(path, config_of(now), config_of(earlier) if earlier else None, None)


def _open(config: Config, device: torch.device) -> RunFolder:
    path = Path(config.train.runs_dir) / config.train.name
    path.mkdir(parents=True, exist_ok=True)
    lock = _lock(path)
    if not (path / CONFIG).exists():
        foreign = sorted(entry.name for entry in path.iterdir() if entry.name != LOCK)
        require(
            not foreign,
            f"train.name={config.train.name}: {path} holds {', '.join(foreign[:3])} and is no run folder",
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


def _lock(path: Path) -> IO[str]:
    """Take the folder's lock; it is released when the file is closed or the process ends, however it ends."""
    file = (path / LOCK).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path} is in use by another process") from None
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
