"""`moe.router=token_table`: the experts of each token id, or n-gram, from a file.

DeepSeek-V4's hash layers have such a table, tid2eid [ids, k], in their checkpoint, with weights by a live gate:
moe.weights=live moe.gate=sqrt_softplus. It replaces a table that is built from the text (`hashed`). For those who
continue a model with hash layers, compare recipes of tables, or distil a learned router into one. `launch.tables
export=FILE` writes a run's balanced tables in this form.

A file is a .npy array of whole numbers, [rows, k], or [tables, rows, k] with one for each layer; or a .safetensors file
with a tensor [rows, k] for each layer or for all. A row is that of a token id where moe.ngram=1. For longer n-grams it
is the key, base vocabulary size, if all have rows, otherwise its hash, as of a hashed router with train.seed. A file
with more columns than k is used up to k.

Letters: r rows, K columns listed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from foreroute.engine.config import MoEConfig, RouteWeights, Split
from foreroute.engine.config.option import option
from foreroute.engine.errors import UserError, require
from foreroute.engine.routing.method_options import Card, read_options
from foreroute.engine.routing.ngram_rows import KeyRows
from foreroute.engine.routing.planned_router import RouterInputs, TableRouter, check_use
from foreroute.engine.routing.row_sets import WEIGH, RowSets, column_dtype, equal_weights
from foreroute.engine.sealed_files import replacing

_WEIGH = {**WEIGH, RouteWeights.table: equal_weights}  # the file has no weights
_LAYER = "{layer}"


@dataclass
class Options:
    """Options of moe.router=token_table."""

    file: str = option("", "The table: .npy or .safetensors, the experts of each row, the most wanted first.")
    tensor: str = option(
        "tid2eid.{layer}",
        "Name of a layer's tensor in a .safetensors file; {layer} is the number of the layer among those with experts,"
        " from 0. A file with a single tensor needs none.",
    )


class TokenTableRouter(TableRouter):
    """The router of one table from a file."""

    card = Card(
        "the experts that a file lists for the token id or n-gram; with moe.weights=live the weights of a learned gate",
        "DeepSeek-V4's hash layers (tid2eid); Hash Layers, arXiv 2106.04426",
        "as hashed; with live weights the gate's product on the received rows, and no byte more",
        "going on with a model with hash layers, or with a table made elsewhere",
    )

    needs_file = True
    uses = (
        *("ngram", "share_table", "options"),
        *("weights", "gate", "gate_normalised", "gate_scale"),
        *("constant_experts", "copy_experts", "null_experts"),
    )
    at_most_k = True

    def __init__(self, order_rK: Tensor, key_rows: KeyRows, moe: MoEConfig) -> None:
        """Take a table.

        Args:
            order_rK: uint8, or int16 above 256 columns.
            key_rows: the map from n-grams to its rows.
        """
        super().__init__(moe.experts, key_rows, columns=moe.columns)
        self.order_rK, self.weights = order_rK, moe.weights

    @classmethod
    def build(cls, moe: MoEConfig, inputs: RouterInputs) -> Sequence[Self]:
        """Read the tables; the text is not read.

        Raises:
            UserError: there is no such file, or it is no table of these experts and ids.
        """
        options = read_options(moe, Options)
        require(options.file != "", "moe.router=token_table: needs a table, moe.options.file=FILE")
        return [cls._of_array(moe, inputs, index, read_table(options, index)) for index in range(inputs.number)]

    @classmethod
    def _of_array(cls, moe: MoEConfig, inputs: RouterInputs, index: int, found_rK: NDArray[Any]) -> Self:
        name = f"moe.options.file={read_options(moe, Options).file}"
        whole = found_rK.ndim == 2 and np.issubdtype(found_rK.dtype, np.integer) and found_rK.size > 0
        require(whole, f"{name}: is {found_rK.dtype} {list(found_rK.shape)}: must be whole numbers [rows, k]")
        low, high = int(found_rK.min()), int(found_rK.max())
        require(
            low >= 0 and high < moe.columns, f"{name}: has experts {low} .. {high}: must be in 0 .. {moe.columns - 1}"
        )
        sorted_rK = np.sort(found_rK, axis=1)
        twice = np.flatnonzero((sorted_rK[:, 1:] == sorted_rK[:, :-1]).any(axis=1))
        require(twice.size == 0, f"{name}: row {twice[:1].sum()} lists an expert twice")
        rows = len(found_rK)
        require(
            moe.ngram > 1 or rows >= inputs.vocab_size,
            f"{name}: has {rows} rows: moe.ngram=1 needs one for each of {inputs.vocab_size} ids",
        )
        key_rows = KeyRows(moe.ngram, inputs.vocab_size, rows, inputs.seed, index)
        return cls(torch.from_numpy(found_rK.astype(column_dtype(moe.columns))), key_rows, moe)

    @classmethod
    def restore(cls, moe: MoEConfig, inputs: RouterInputs, states: Sequence[Mapping[str, Tensor]]) -> Sequence[Self]:
        """Take the saved tables; the file is not needed."""
        return [
            cls(state["order_rK"], KeyRows(ngram, vocab_size, len(state["order_rK"]), seed, index), moe)
            for state in states
            for ngram, vocab_size, seed, index in [state["numbers"].tolist()]
        ]

    def refusal(self, split: Split, k: int) -> str | None:
        """Refuse more experts than the table lists."""
        listed = self.order_rK.shape[1]
        return (
            None if k <= listed else f"k={k}: the table of moe.router=token_table lists {listed} experts for each row"
        )

    def row_sets(self, k: int) -> RowSets:
        """Return the first k experts of each row."""
        check_use([self], Split.train, k)
        return RowSets(self.order_rK[:, :k], _WEIGH[self.weights])

    def state(self) -> dict[str, Tensor]:
        """Return the table."""
        return {"order_rK": self.order_rK, "numbers": torch.tensor(self._numbers())}

    def identity(self, *, weights: bool = True) -> Sequence[NDArray[Any]]:
        """Return the table."""
        return [np.array(self._numbers()), self.order_rK.numpy()]

    def _numbers(self) -> list[int]:
        rows = self.key_rows
        return [rows.ngram, rows.vocab_size, rows.seed, rows.index]


def read_table(options: Options, index: int) -> NDArray[Any]:
    """Read the table of expert layer number `index`.

    Raises:
        UserError: the file cannot be read, or has no such table.
    """
    path = Path(options.file)
    name = f"moe.options.file={path}"
    require(path.suffix in (".npy", ".safetensors"), f"{name}: must end with .npy or .safetensors")
    try:
        if path.suffix == ".npy":
            found: NDArray[Any] = np.load(path, allow_pickle=False)
        else:
            with safe_open(path, framework="np") as file:
                found = file.get_tensor(_tensor_name(name, list(file.keys()), options.tensor, index))
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if found.ndim == 3 and path.suffix == ".npy":
        require(index < len(found), f"{name}: has {len(found)} tables: expert layer {index} needs one")
        found = found[index]
    return found


def write_tables(path: Path, tables: Sequence[Tensor]) -> None:
    """Write tables [rows, k] as a file that read_table reads, in int64 as tid2eid.

    Raises:
        UserError: the file's name has another ending, or it cannot be written.
    """
    found = [table.long().contiguous().numpy() for table in tables]
    require(path.suffix in (".npy", ".safetensors"), f"export={path}: must end with .npy or .safetensors")
    try:
        with replacing(path) as new:
            if path.suffix == ".npy":
                with new.open("wb") as file:
                    np.save(file, found[0] if len(found) == 1 else np.stack(found))
            else:
                save_file({Options.tensor.replace(_LAYER, str(index)): table for index, table in enumerate(found)}, new)
    except OSError as error:
        raise UserError(f"export={path}: cannot be written ({error.strerror})") from error


def _tensor_name(file: str, names: list[str], wanted: str, index: int) -> str:
    wanted = wanted.replace(_LAYER, str(index))
    if wanted in names:
        return wanted
    require(
        len(names) == 1,
        f"moe.options.tensor={wanted}: {file} has no such tensor, but {len(names)} others, such as {names[:1]}",
    )
    return names[0]


ROUTER = TokenTableRouter
