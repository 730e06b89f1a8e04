"""All n-gram tables of a model: the rows that its input or its layers read, and their part of the optimizer step.

The model holds an NgramTables, whose learned projections are parameters like others. The rows are none: they are shared
out over all ranks (engine/ngram_tables/store.py) and change beside DeepSpeed's step, by `grad_norm` and `update`, which
the engine calls (engine/optim/deepspeed_engine.py).

Letters: B streams, Q segment length, H heads of a table, W width of a row, D model width.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foreroute.engine.config import NgramEntry, NgramKeys, NgramTablesConfig, RowPlace, WireFormat
from foreroute.engine.ngram_tables.entries import ENGRAM, PER_LAYER, Added, Entry, EntryOutput, Gated, IntoValues
from foreroute.engine.ngram_tables.hash_keys import HashKeys, hash_keys
from foreroute.engine.ngram_tables.public_keys import MultiplyXorKeys, engram_keys, qwen_keys
from foreroute.engine.ngram_tables.row_rules import RowRule, RowSGD
from foreroute.engine.ngram_tables.sharded import ShardedTable
from foreroute.engine.ngram_tables.store import RowStore
from foreroute.engine.parallel.collectives import ExpertGroupComm, all_reduce_sum
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.plan import Routing
from foreroute.engine.routing.plans.row_plan import RowsPlan, TableKeys


def table_keys(config: NgramTablesConfig, vocab_size: int, seed: int) -> tuple[TableKeys, ...]:
    """Return how n-grams find their rows in each table of a run whose rows the ranks share out."""
    return tuple(keys_of_table(config, table, vocab_size, seed) for table in range(len(config.places)))


def keys_of_table(config: NgramTablesConfig, table: int, vocab_size: int, seed: int) -> HashKeys | MultiplyXorKeys:
    """Return how n-grams find their rows in the table of this number."""
    orders, layers = tuple(config.orders), config.layers or [0]
    if config.keys is NgramKeys.hash:
        return hash_keys(orders, config.heads, config.rows, vocab_size=vocab_size, seed=seed, table=table)
    if config.keys is NgramKeys.qwen:
        return qwen_keys(vocab_size, table, orders=orders, rows=config.rows, heads=config.heads, seed=seed)
    rows = [config.rows] * len(orders)
    return engram_keys(vocab_size, layers, layers[table], orders=orders, rows=rows, heads=config.heads, seed=seed)


class NgramTables(nn.Module):
    """The tables of a model, in the order of the places that read them.

    Args:
        width: of the model (D).
        inner: of attention's values, all heads together.
        seed: of the run.
        init_std: standard deviation of the rows' initial values.
    """

    def __init__(
        self, config: NgramTablesConfig, *, width: int, inner: int, vocab_size: int, seed: int, init_std: float
    ) -> None:
        super().__init__()
        self.config, self._seed, self._scale = config, seed, init_std
        self.keys = table_keys(config, vocab_size, seed)
        self.entries = nn.ModuleList(_entry(config, keys.heads * config.width, width, inner) for keys in self.keys)
        self.tables: tuple[ShardedTable, ...] = ()
        self.updates: int | Tensor = 0
        """Updates that the rows had, of the whole run; those that were refused do not count."""
        self.comm: ExpertGroupComm | None = None  # all ranks; None: this rank alone
        self._mesh, self._id_bytes = Mesh(), 0
        self._grads: list[Tensor] = []

    def hold(
        self,
        mesh: Mesh,
        rule: RowRule,
        comm: ExpertGroupComm | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Make this rank's rows, with their initial values.

        Args:
            rule: how a step changes them.
            comm: all ranks; None for one rank alone.
        """
        self.comm, self._mesh = comm, mesh
        on_host = self.config.place is RowPlace.host
        wire = {WireFormat.fp32: torch.float32, WireFormat.bf16: torch.bfloat16}.get(self.config.wire)
        self.tables = tuple(
            ShardedTable(
                RowStore(
                    keys.rows,
                    self.config.width,
                    rank=mesh.rank,
                    world=mesh.world,
                    seed=self._seed,
                    index=table,
                    scale=self._scale,
                    rule=rule,
                    device="cpu" if on_host else device,
                    dtype=dtype,
                ),
                comm,
                wire,
                device if on_host else None,
            )
            for table, keys in enumerate(self.keys)
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the rows with the module's parameters, as for `.to(device)`; their type stays."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for table in self.tables:
            table.to(fn(torch.empty(0)).device)
        return self

    @property
    def num_rows(self) -> int:
        """Rows of all tables, on all ranks."""
        return sum(keys.rows for keys in self.keys)

    @property
    def num_parameters(self) -> int:
        """Numbers in the rows of all tables, on all ranks."""
        return self.num_rows * self.config.width

    @property
    def num_unread(self) -> int:
        """Of these numbers, those that a symbol does not read."""
        return self.num_parameters - self.config.width * sum(keys.heads for keys in self.keys)

    @property
    def sent_bytes(self) -> int:
        """Bytes that this rank has sent: rows, gradients, and the row numbers that its host sent for them."""
        return self._id_bytes + (0 if self.comm is None else self.comm.sent_bytes)

    def fetch(self, plans: Sequence[RowsPlan]) -> None:
        """Send the rows of the step that begins to the ranks that read them; without plans they have landed before."""
        if plans and not self.tables:  # a model that is not in training
            self.hold(Mesh(), RowSGD(), device=plans[0].send_S.device)
        for table, plan in zip(self.tables, plans, strict=bool(plans)):
            table.fetch(plan)
            self._id_bytes += sum(plan.id_bytes_P) - plan.id_bytes_P[self._mesh.rank]

    def ahead(self, routing: Routing) -> Routing:
        """Fetch from host memory the rows of the step that begins with this pass; in the loader's thread and the order
        of the steps."""
        if not routing.row_plans:
            return routing
        plans = tuple(table.ahead(plan) for table, plan in zip(self.tables, routing.row_plans, strict=True))
        return replace(routing, row_plans=plans)

    def settle(self, *, restart: bool = False) -> None:
        """Bring the stores up to date with the last step, before anything else reads them.

        Args:
            restart: forget the steps whose rows were fetched ahead and have not begun.
        """
        for table in self.tables:
            table.settle(restart=restart)

    def enter(
        self, place: int | None, x_BQD: Tensor, routing: Routing, kept: Sequence[Tensor], memory: int
    ) -> EntryOutput:
        """Let the rows of a place's table enter its layer.

        Args:
            place: number of a layer, whose input x is; None: the model's input.
            kept: of each table what `kept` of its last output was; empty at the start of a text.
            memory: positions that attention will see of this segment and those before.

        Returns:
            In `kept` all that the next segment needs.
        """
        if place not in self.config.places:
            return EntryOutput(x_BQD)
        table = self.config.places.index(place)
        row_BQHW = F.embedding(routing.landed_BQH[table], self.tables[table].landed()).to(x_BQD.dtype)
        output: EntryOutput = self.entries[table](
            row_BQHW, x_BQD, kept[table] if kept else None, memory=memory, position_BQ=routing.position_BQ
        )
        return output

    def return_gradients(self) -> None:
        """Send the gradients of a step to the rows' owners, after its last backward pass; a collective of all ranks."""
        for table in self.tables:
            table.return_gradients()

    def grad_norm(self) -> Tensor:
        """Add the returned gradients up and compute their norm over all tables and ranks; a collective."""
        self._grads = [table.summed_gradients() / self._mesh.world for table in self.tables]
        square = torch.stack([grad_UW.double().square().sum() for grad_UW in self._grads]).sum()
        return (square if self.comm is None else all_reduce_sum(square, self.comm.group)).sqrt()

    def update(self, *, lr: float, scale: Tensor | float, keep: Tensor) -> None:
        """Change the rows by the gradients that `grad_norm` brought.

        Args:
            lr: of the model's other parameters.
            scale: factor of the gradients, for clipping.
            keep: bool scalar on the device; where it is false no row changes.
        """
        step = self.updates + 1
        for table, grad_UW in zip(self.tables, self._grads, strict=True):
            table.update(grad_UW * scale, step=step, lr=lr * self.config.lr_factor, keep=keep)
        self.updates, self._grads = self.updates + keep.long(), []


def _entry(config: NgramTablesConfig, inputs: int, width: int, inner: int) -> Entry:
    """Make an entry for vectors of `inputs` numbers."""
    if config.entry is NgramEntry.add:
        return Added(inputs, width)
    if config.entry is NgramEntry.values:
        return IntoValues(inputs, inner)
    form = PER_LAYER if config.entry is NgramEntry.per_layer else ENGRAM
    return Gated(inputs, width, dilation=max(config.orders), form=form)
