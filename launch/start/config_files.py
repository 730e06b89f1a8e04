"""Configurations from YAML files and from options, as validated objects."""

import math
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from foreroute.engine.config import Config, to_plain
from foreroute.engine.errors import UserError, require
from foreroute.launch.start.arguments import known_to, ready
from foreroute.launch.start.help import CONF
from foreroute.launch.start.one_line import BadOption, one_line

T = TypeVar("T")


def to_object(cfg: DictConfig, schema: type[T]) -> T:
    """Build the validated object of a composed configuration."""
    try:
        found = OmegaConf.to_object(cfg)
        _check_numbers(found, "")
    except UserError as error:
        raise BadOption(str(error)) from error
    if not isinstance(found, schema):
        raise UserError(f"the configuration is no {schema.__name__}")
    return found


def _check_numbers(config: object, prefix: str) -> None:
    """Refuse numbers that are not finite, and whole ones beyond 64 bits, wherever they come from."""
    for field in fields(config) if is_dataclass(config) else ():
        value = getattr(config, field.name)
        name = f"{prefix}{field.name}"
        if is_dataclass(value):
            _check_numbers(value, f"{name}.")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float):
                require(math.isfinite(number), f"{name}={value}: must be a finite number")
            elif isinstance(number, int):
                require(abs(number) < 2**63, f"{name}={value}: must be below 2**63")


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
        raise UserError(f"{path}: {one_line(error)}") from error


def read_plain(path: Path) -> dict[str, Any]:
    """Read a run's resolved configuration as dicts, lists, numbers and text, whatever version wrote it.

    Raises:
        UserError: the file is missing or is no configuration.
    """
    try:
        found = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds no options")
    return {str(name): value for name, value in found.items()}


def read_options(path: Path, schema: type[T]) -> T:
    """Read a YAML file of options that `schema` describes.

    Raises:
        UserError: the file is missing, or has options or values that the schema does not allow.
    """
    require(path.is_file(), f"{path}: no such file")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(path))
        return to_object(cast(DictConfig, merged), schema)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {one_line(error)}") from error


def compose_run(options: list[str]) -> Config:
    """Return the configuration of `launch.train` with these options, from inside another program.

    Raises:
        HydraException, OmegaConfBaseException, UserError: an option is wrong; each becomes one line at the end of a
            program.
    """
    store = ConfigStore.instance()
    own = store.load("schema.yaml").node
    store.store("schema", Config)
    try:
        options = ready(options, known_to(CONF, "train", Config))
        return to_object(hydra.compose("train", overrides=options), Config)
    finally:
        store.store("schema", own)


def config_of(plain: Any) -> Config:
    """Build a configuration from dicts, lists, numbers and text (the inverse of to_plain)."""
    merged = OmegaConf.merge(OmegaConf.structured(Config), plain)
    config: Any = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return config
