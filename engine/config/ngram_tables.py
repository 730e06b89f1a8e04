"""The section `ngram_tables` of a run's configuration: large tables of n-grams, shared out over all ranks."""

from dataclasses import dataclass
from itertools import pairwise

from foreroute.engine.config.enums import (
    NgramEntry,
    NgramKeys,
    RowMoments,
    RowOptimizer,
    RowPlace,
    RowUpdates,
    WireFormat,
)
from foreroute.engine.config.model import MAX_NGRAM, ModelConfig
from foreroute.engine.config.option import check, option
from foreroute.engine.errors import require

_MOST_ROWS = 1 << 31  # of a table: the hosts tell each other 32-bit numbers


@dataclass
class NgramTablesConfig:
    """Learned vectors of n-grams.

    All ranks share out their rows, and only those that a step reads move. Each place that reads a table has one of its
    own: the input, or each layer of `layers`.
    """

    rows: int = option(
        0,
        "Rows of each head; n-grams beyond them share rows by hash. A table has orders x heads as many. 0: no tables.",
        at_least=0,
    )
    orders: list[int] = option([2, 3], "Ids in the n-grams that are looked up, such as [2,3] for pairs and triples.")
    heads: int = option(
        4,
        "Rows of each order that a token reads, each by a hash of its own: fewer n-grams collide in all of them.",
        at_least=1,
    )
    width: int = option(
        32,
        "Numbers in a row. The rows of all orders and heads are concatenated, and projected to model.width where"
        " they are not as wide.",
        at_least=1,
    )
    layers: list[int] = option(
        [],
        "Layers, by their numbers from 0, that read a table each. Empty: the model's input, to which rows are added.",
    )
    entry: NgramEntry = NgramEntry.add
    keys: NgramKeys = NgramKeys.hash
    optimizer: RowOptimizer = RowOptimizer.sparse
    updates: RowUpdates = RowUpdates.count
    moments: RowMoments = RowMoments.element
    lr_factor: float = option(1.0, "Learning rate of rows, as a multiple of that of optim.", above=0)
    wire: WireFormat = option(WireFormat.model, "Number format in which rows and their gradients travel; model: fp32.")
    place: RowPlace = RowPlace.device

    def __post_init__(self) -> None:
        check("ngram_tables", self)
        orders = self.orders
        require(
            len(orders) > 0 and orders[0] >= 1 and orders[-1] <= MAX_NGRAM and _ascending(orders),
            f"ngram_tables.orders={orders}: must be ascending numbers in 1 .. {MAX_NGRAM}, such as [2,3]",
        )
        require(
            _ascending(self.layers) and min(self.layers, default=0) >= 0,
            f"ngram_tables.layers={self.layers}: must be ascending numbers of layers from 0, such as [1,3]",
        )
        require(
            self.entry is NgramEntry.add or bool(self.layers),
            f"ngram_tables.entry={self.entry.name}: needs ngram_tables.layers; the model's input takes entry=add alone",
        )
        for name, given in (("layers", self.layers), ("place", self.place is RowPlace.host and "host")):
            require(
                not (given and self.rows and self.dense),
                f"ngram_tables.{name}={given}: needs ngram_tables.optimizer=sparse; a dense table is an ordinary"
                " parameter at the model's input",
            )
        require(
            self.rows * self.heads_read < _MOST_ROWS,
            f"ngram_tables.rows={self.rows} with {len(orders)} orders of {self.heads} heads: must be below {_MOST_ROWS}"
            " together",
        )

    @property
    def context(self) -> int:
        """Ids left of a segment that the n-grams reach."""
        return max(self.orders) - 1 if self.rows else 0

    @property
    def dense(self) -> bool:
        """Whether each rank has the whole table in an ordinary parameter."""
        return self.optimizer is RowOptimizer.dense

    @property
    def heads_read(self) -> int:
        """Rows of a table that a token reads."""
        return len(self.orders) * self.heads

    @property
    def places(self) -> list[int | None]:
        """The layers that read a table whose rows the ranks share out; None is the model's input."""
        if not self.rows or self.dense:
            return []
        return [*self.layers] or [None]


def dense_table(model: ModelConfig, tables: NgramTablesConfig) -> NgramTablesConfig | None:
    """Return the section of the dense table at the model's input, whichever name it has; None: there is none.

    Raises:
        UserError: there is another table at the input.
    """
    if tables.rows and tables.dense:
        other = f"model.ngram={model.ngram}" if model.ngram else "model.signatures=true"
        require(
            not model.ngram and not model.signatures, f"{other} with ngram_tables.optimizer=dense: take one of them"
        )
        return tables
    if not model.ngram:
        return None
    return NgramTablesConfig(
        rows=model.ngram_rows, orders=[model.ngram], heads=1, width=model.width, optimizer=RowOptimizer.dense
    )


def _ascending(numbers: list[int]) -> bool:
    return all(first < second for first, second in pairwise(numbers))
