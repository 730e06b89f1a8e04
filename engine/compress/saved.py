"""A checkpoint rewritten: experts merged or pruned, or their matrices as int8.

Everything else of the checkpoint stays as it is: other parameters and their moments, memory, random state, step. So the
result evaluates, generates and, unless it holds int8, trains on.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foreroute.engine.checkpoint import files
from foreroute.engine.checkpoint.parameters import Reader, by_name
from foreroute.engine.checkpoint.save_load import INT8, SCALE, STATE_KEYS
from foreroute.engine.compress.choose import Choice
from foreroute.engine.compress.experts import regrouped
from foreroute.engine.compress.tables import regrouped_table
from foreroute.engine.moe.int8_weights import CHANNEL_DIM, quantised
from foreroute.engine.parallel.cpu_group import CpuGroup
from foreroute.engine.routing.tables import table_from_state, table_state

Tensors = dict[str, Tensor]


def rewrite(
    source: Path, target: Path, change: Callable[[Tensors], Tensors], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Write a checkpoint with changed tensors; return its manifest.

    Args:
        change: returns the tensors to write, given those of the source.
        facts: go over those of the source's manifest.

    Raises:
        UserError: the source is damaged.
        OSError: the target could not be written.
    """
    reader = Reader(source, CpuGroup())
    header = {key: value for key, value in reader.manifest.items() if key not in ("files", "tensors", "format")}
    tensors = change({key: reader.get(key) for key in reader.keys})
    step = files.step_of(target)
    files.write_whole(
        target,
        CpuGroup(),
        lambda: {key: value.contiguous() for key, value in tensors.items()},
        lambda _: {"format": files.FORMAT, **header, **facts},
        temporary=files.temporary_name(step),
    )
    return files.read_manifest(target)


def expert_layers(keys: Sequence[str]) -> list[str]:
    """List the names before w1, w2 and so on of the expert layers' parameters, in the order of the layers."""
    names = (key.split("/")[1].rpartition(".")[0] for key in keys if key.startswith("weight/"))
    found = dict.fromkeys(name for name in names if by_name(f"{name}."))
    return sorted(found, key=lambda name: [int(part) for part in name.split(".") if part.isdigit()])


def with_groups(tensors: Tensors, choices: Sequence[Choice], columns: int) -> Tensors:
    """Return a checkpoint's tensors with each layer's experts, their moments and the tables regrouped.

    Args:
        choices: of each table: one for all layers, or one for each.
        columns: experts and columns without one, before.
    """
    found = {key: value for key, value in tensors.items() if not (by_name(key) and key.split("/")[0] in STATE_KEYS)}
    for number, prefix in enumerate(expert_layers(list(tensors))):
        choice = choices[number % len(choices)]
        layer = {kind: _stacked(tensors, f"{kind}/{prefix}.") for kind in STATE_KEYS}
        for kind, named in regrouped(layer, choice.groups, choice.use_E).items():
            for name, value_G in named.items():
                found |= {f"{kind}/{prefix}.{name}/{g:05d}": value for g, value in enumerate(value_G.unbind())}
    for index, state in _tables(tensors).items():
        table = regrouped_table(table_from_state(state), choices[index].groups, columns)
        found |= {f"table/{index}/{name}": value for name, value in table_state(table).items()}
    return found


def with_int8(tensors: Tensors) -> Tensors:
    """Return what an evaluation reads of a checkpoint's tensors, the experts' matrices as int8 with scales."""
    found: Tensors = {}
    for key, value in tensors.items():
        kind, _, rest = key.partition("/")
        name = rest.split("/")[0].rpartition(".")[2]
        if kind == STATE_KEYS[0] and by_name(rest) and name in CHANNEL_DIM:
            found[f"{INT8}/{rest}"], found[f"{SCALE}/{rest}"] = quantised(value, name)
        elif kind not in (*STATE_KEYS[1:], "memory", "rng"):
            found[key] = value
    return found


def expert_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes of the experts' parameters, without moments."""
    kinds = STATE_KEYS[0], INT8, SCALE
    return sum(value.nbytes for key, value in tensors.items() if by_name(key) and key.split("/")[0] in kinds)


def _stacked(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    """Return the parameters whose keys begin so, of all experts."""
    names = dict.fromkeys(key.removeprefix(prefix).split("/")[0] for key in tensors if key.startswith(prefix))
    return {
        name: torch.stack([tensors[key] for key in sorted(tensors) if key.startswith(f"{prefix}{name}/")])
        for name in names
    }


def _tables(tensors: Tensors) -> dict[int, dict[str, Tensor]]:
    found: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, *rest = key.split("/")
        if kind == "table":
            found.setdefault(int(rest[0]), {})[rest[1]] = value
    return found
