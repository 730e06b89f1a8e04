"""Between a person's command line and the engine: Hydra composes, dataclasses validate, errors become one line.

The only file that knows Hydra and OmegaConf. A program is `run_program("NAME", Schema, task)` with conf/NAME.yaml; the
task receives the validated object and returns an exit code. What the user can mend ends with one line and exit code 2.
"""

import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from engine.config import Config, to_plain
from engine.errors import RunFailed, UserError
from launch.process import find_place

CONF = Path(__file__).resolve().parents[1] / "conf"
T = TypeVar("T")
_BELOW_NULL = "Unexpected type: None"
"""What OmegaConf asserts when an option lies two levels below null, such as cluster.inside.gb_per_s without a cluster."""


class _BadOption(UserError):
    """What is wrong with a start before the ranks meet; all ranks of a machine see it alike."""


def run_program(
    name: str, schema: type[T], task: Callable[[T], int], *, many_ranks: bool = False
) -> NoReturn:
    """Compose conf/`name`.yaml with the command line into a `schema` object, run the task and exit with its code.

    Args:
        many_ranks: the task knows how to be one rank of many; otherwise a launcher's second process is refused.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us instead of being printed by Hydra
    ConfigStore.instance().store("schema", schema)
    code = 0

    def job(cfg: DictConfig) -> None:
        nonlocal code
        if code == 0:  # a sweep stops at the first job that fails
            code = _guarded(lambda: task(_to_object(cfg, schema)))

    def compose_and_run() -> int:
        ranks = find_place().ranks
        if ranks > 1 and not many_ranks:
            raise _BadOption(f"launch.{name} runs as one process: started as {ranks}")
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(job)()
        return code

    sys.exit(_guarded(compose_and_run))


def _guarded(run: Callable[[], int]) -> int:
    """Turn expected failures into one line on stderr and an exit code; anything else is a bug and keeps its traceback."""
    try:
        return run()
    except (HydraException, OmegaConfBaseException, YAMLError, _BadOption) as error:
        if find_place().local_rank == 0:  # a machine's ranks share the command line
            _say(_one_line(error))
        return 2
    except AssertionError as error:
        if str(error) != _BELOW_NULL:
            raise
        if find_place().local_rank == 0:
            _say("an option is of a section that is null: name that first, such as cluster=NAME")
        return 2
    except (UserError, RunFailed) as error:
        if not error.everywhere or find_place().rank == 0:
            _say(_one_line(error))
        return 2 if isinstance(error, UserError) else 1
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        _say(str(error))
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _say(line: str) -> None:
    """Write in one piece: other ranks write to the same terminal."""
    sys.stderr.write(f"foreroute: {line}\n")


def _to_object(cfg: DictConfig, schema: type[T]) -> T:
    try:
        found = OmegaConf.to_object(cfg)
    except UserError as error:
        raise _BadOption(str(error)) from error
    if not isinstance(found, schema):
        raise UserError(f"the configuration is no {schema.__name__}")
    return found


_NOISE = (
    "full_key:",
    "object_type=",
    "reference_type=",
    "Set the environment",
    "See https",
    "Config search path",
    "provider=",
)


def _one_line(error: BaseException) -> str:
    """The message in one line: what Hydra and OmegaConf spread over lines and causes, joined, without their advice."""
    parts = _lines(error)
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException):
        parts += _lines(cause)
    text = ": ".join(part.rstrip(".") for part in dict.fromkeys(parts)) or type(error).__name__
    text = text.split(" To append to your config")[0]
    return text + _allowed_keys(text)


def _lines(error: BaseException) -> list[str]:
    lines = [line.strip() for line in str(error).splitlines()]
    return [line for line in lines if line and not line.startswith(_NOISE)]


def _allowed_keys(text: str) -> str:
    """For an unknown option: the names that its section has."""
    found = re.match(r"Could not override '([\w.]+)'", text)
    if not found:
        return ""
    node: Any = ConfigStore.instance().load("schema.yaml").node
    for part in found[1].split(".")[:-1]:
        inner = OmegaConf.select(node, part)
        if not OmegaConf.is_dict(inner):
            break
        node = inner
    return f" no such option; allowed: {', '.join(str(name) for name in node)}"


def job_name(name: str) -> str:
    """The run's name; in a sweep (-m) with the job's own options, so that every job has its own folder."""
    hydra_config = HydraConfig.get()
    if hydra_config.mode is not RunMode.MULTIRUN:
        return name
    return re.sub(r"[^A-Za-z0-9_.=-]+", "_", f"{name}-{hydra_config.job.override_dirname}")


def write_config(config: object, path: Path) -> None:
    """Write a configuration object as YAML."""
    OmegaConf.save(OmegaConf.create(to_plain(config)), path)


def read_config(path: Path) -> Config:
    """Read a run's resolved configuration.

    Raises:
        UserError: the file is missing or does not fit this version.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; a run folder holds a config.yaml")
    try:
        return config_of(OmegaConf.load(path))
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {_one_line(error)}") from error


def config_of(plain: Any) -> Config:
    """Build a configuration from dicts, lists, numbers and text (the inverse of to_plain)."""
    merged = OmegaConf.merge(OmegaConf.structured(Config), plain)
    config: Any = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return config
