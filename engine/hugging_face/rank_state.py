"""A file for each rank that holds its part of a training state: safetensors, with the rest as JSON in the header.

Values are nested dicts, lists and tuples of tensors, numbers, texts and None. They come back bit for bit. Nothing is
pickled.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from foreroute.engine.errors import UserError, require
from foreroute.engine.sealed_files import replacing

_FORMAT = "foreroute 1"
_PREFIX = "foreroute-rank-"


def write_rank_state(folder: Path, state: Mapping[str, Any], rank: int = 0, ranks: int = 1) -> None:
    """Write a rank's state into a folder, which is created if it is missing; a file of the same rank is replaced.

    Raises:
        TypeError: a value is neither a tensor nor plain.
    """
    tensors: dict[str, Tensor] = {}
    plain = json.dumps(_encoded(state, tensors))
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / _name(rank, ranks)) as file:
        save_file(tensors, file, {"format": _FORMAT, "state": plain})


def read_rank_state(folder: Path, rank: int = 0, ranks: int = 1) -> dict[str, Any]:
    """Return the state that a rank wrote, on the host.

    Raises:
        UserError: the file is missing, damaged, or of another number of ranks.
    """
    file = folder / _name(rank, ranks)
    if not file.is_file():
        others = sorted(found.name for found in folder.glob(f"{_PREFIX}*"))
        raise UserError(
            f"{file}: missing" + (f"; the folder holds {others[0]}: must be of {ranks} ranks" * bool(others))
        )
    try:
        with safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        require(header.get("format") == _FORMAT, f"{file}: format {header.get('format')}, this program reads {_FORMAT}")
        state: dict[str, Any] = _decoded(json.loads(header["state"]), tensors)
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{file}: damaged ({type(error).__name__}: {error})") from None
    return state


def plain_part(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that a file can hold; objects of other types are left out."""
    return {key: value for key, value in values.items() if _is_plain(value)}


def _name(rank: int, ranks: int) -> str:
    return f"{_PREFIX}{rank:05d}-of-{ranks:05d}.safetensors"


def _is_plain(value: Any) -> bool:
    try:
        _encoded(value, {})
    except TypeError:
        return False
    return True


def _encoded(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return a value as JSON holds it, and add its tensors to `tensors`."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[_encoded(key, tensors), _encoded(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple | list):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_encoded(item, tensors) for item in value]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__}: must be a tensor, number, text or None, or a dict, list or tuple of them")


def _decoded(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {_decoded(key, tensors): _decoded(item, tensors) for key, item in content}
    if kind == "float":
        return float(content)
    items = [_decoded(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
