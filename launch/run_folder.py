"""The folder of a run, runs/<name>: what is in it, and the rule that nothing in it is ever overwritten by another run.

config.yaml (resolved), metrics.jsonl, checkpoints/, loss.png, slimming.png, summary.json.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.config import Config, to_plain
from engine.errors import UserError
from engine.tuning import resolve
from launch.cli import read_config, write_config

# Options that may differ when a run is resumed: they change what is written and how far it goes, not a step's numbers.
FREE = (
    "train.resume", "train.log_every", "train.valid_every", "train.save_every", "train.keep", "train.threads",
    "train.runs_dir", "data.prefetch", "corpus.cache_dir", "eval", "wandb",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RunFolder:
    """An opened run folder."""

    path: Path
    config: Config  # resolved
    resuming: bool  # the folder already held this run


def open_run(config: Config) -> RunFolder:
    """Create the run's folder and write its resolved configuration, or open it to resume.

    Raises:
        UserError: the folder holds a run and train.resume is false, or it holds a run of another configuration.
    """
    path = Path(config.train.runs_dir) / config.train.name
    file = path / "config.yaml"
    if not file.exists():
        if path.exists() and any(path.iterdir()):
            raise UserError(f"train.name={config.train.name}: {path} exists and is no run folder")
        path.mkdir(parents=True, exist_ok=True)
        resolved = resolve(config)
        write_config(resolved, file)
        return RunFolder(path, resolved, resuming=False)
    if not config.train.resume:
        raise UserError(
            f"train.name={config.train.name}: {path} already holds a run; take another train.name, "
            "or train.resume=true to go on with it"
        )
    earlier = read_config(file)
    if config.kernels.masked_from_k is None:
        config = replace(
            config, kernels=replace(config.kernels, masked_from_k=earlier.kernels.masked_from_k)
        )
    _refuse_changes(to_plain(earlier), to_plain(config), path)
    return RunFolder(path, config, resuming=True)


def _refuse_changes(earlier: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    for section, options in now.items():
        for name, value in options.items():
            before = earlier[section][name]
            if value != before and section not in FREE and f"{section}.{name}" not in FREE:
                raise UserError(
                    f"{section}.{name}={value}: the run in {path} was started with {before}; "
                    "a resumed run keeps its options"
                )
