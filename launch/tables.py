"""The load of experts and ranks by a run's tables: `python -m launch.tables experiment=enwik8_hashed ranks=[2,4,8]`.

Builds the tables as training would and counts them on one split of the text. Loads are max / mean (1 is perfectly even)
of the worst table; ranks touched by a token and rows on the wire are means over the tables. Prints one line for each k,
and below them what the columns are, and how many distinct n-grams the tokens of a micro-batch have in training.
`json=FILE` writes the same numbers. `export=FILE` writes the tables themselves,
the first schedule.k_max experts of each row, as moe.router=token_table reads them; with moe.ngram=1 that is tid2eid
[ids, k] of DeepSeek-V4's hash layers.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from torch import Tensor

from foreroute.engine.config import Config, MoEConfig, Split
from foreroute.engine.config.option import option
from foreroute.engine.data.corpus import prepare
from foreroute.engine.data.streams import Streams
from foreroute.engine.errors import UserError, require
from foreroute.engine.evaluation.table_balance import Balance, RankBalance, balances, unique_ngrams
from foreroute.engine.model.build import router_inputs
from foreroute.engine.routing.methods import method_of
from foreroute.engine.routing.planned.hashed import HashedRouter
from foreroute.engine.routing.planned.token_table import write_tables
from foreroute.engine.routing.tables import Table
from foreroute.launch.runs.folder import write_json
from foreroute.launch.start.cli import run_program
from foreroute.launch.start.console import table

COLUMNS = """\
k          active experts of each token, or their mean
experts    expert rows of the busiest expert to the mean of all: 1 is perfectly even; the worst table
blocks     the same of blocks of experts, which builder packed fills one after the other
P ranks    the same of ranks, where P ranks share out the experts
touched    ranks that hold an active expert of a token, mean
wire rows  rows of a token that leave its rank, for each layer and direction, mean"""
"""The meaning of the table's columns."""
_ORDERS = 1, 2, 3  # of n-grams whose distinct ones are counted


@dataclass
class TablesArgs(Config):
    """Options: a run's configuration, and what to count."""

    ranks: list[int] = option([2, 4, 8], "Sizes of the expert group.")
    split: Split = option(Split.valid, "Part of the corpus that is counted.")
    json: str | None = option(None, "File for the numbers as JSON; one that is there is replaced.")
    export: str | None = option(
        None,
        "File for the tables, .npy or .safetensors: the first schedule.k_max experts of each row, as"
        " moe.router=token_table reads them; one that is there is replaced.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not self.moe.by_layer, "moe.by_layer: must be empty; tables of other options are built one run each")
        bad = [num for num in self.ranks if num < 1 or self.moe.experts % num]
        require(not bad, f"ranks={bad}: must divide moe.experts={self.moe.experts}")
        require(table_method(self.moe) is not None, f"moe.router={self.moe.router}: has no tables, as hashed has")
        require(
            self.export is None or self.moe.router == "hashed",
            f"export={self.export} with moe.router={self.moe.router}: only tables of hashed are exported",
        )


def table_method(moe: MoEConfig) -> type[HashedRouter] | None:
    """Return the class of routers with tables; None for others."""
    method = method_of(moe)
    return method if method is not None and issubclass(method, HashedRouter) else None


def over_tables(same_k: Sequence[Balance]) -> Balance:
    """Combine the balances of several tables at one k: the worst loads, the mean of the rows sent."""
    ranks = {
        num: RankBalance(
            load=max(found.ranks[num].load for found in same_k),
            touched=fmean(found.ranks[num].touched for found in same_k),
            wire_rows=fmean(found.ranks[num].wire_rows for found in same_k),
        )
        for num in same_k[0].ranks
    }
    experts, blocks = (max(getattr(found, name) for found in same_k) for name in ("experts", "blocks"))
    return Balance(same_k[0].k, experts, blocks, ranks)


def tables(args: TablesArgs) -> int:
    """Build, count and print; returns the exit code."""
    corpus = prepare(args.corpus, print)
    inputs = router_inputs(corpus, args.corpus, args.num_tables, args.train.seed)
    method = table_method(args.moe)
    assert method is not None
    found_tables = [router.table for router in method.build(args.moe, inputs)]
    ids, pack = corpus.split(args.split), found_tables[0].pack
    starts = corpus.document_starts(args.split)
    of_tables = [
        balances(table, ids, args.ranks, starts if len(starts) else None, experts=args.moe.experts)
        for table in found_tables
    ]
    found = [over_tables(same_k) for same_k in zip(*of_tables, strict=True)]
    print(
        f"{len(found_tables)} tables, builder {args.moe.builder.name}, blocks of {pack}, on {ids.size:,} symbols of the"
        f" {args.split.name} split"
    )
    header = ["k", "experts", "blocks"]
    for num in args.ranks:
        header += [f"{num} ranks", "touched", "wire rows"]
    rows = []
    for line in found:
        values = [line.experts, line.blocks]
        for on in line.ranks.values():
            values += [on.load, on.touched, on.wire_rows]
        rows.append([str(line.k), *(f"{value:.3f}" for value in values)])
    print(table(header, rows))
    print(COLUMNS)
    unique = unique_ngrams(
        Streams(
            corpus.split(Split.train),
            args.data.streams,
            args.data.segment,
            max(_ORDERS) - 1,
            document_starts=corpus.document_starts(Split.train),
        ),
        corpus.vocab.size,
        _ORDERS,
        accumulation=args.train.accumulation,
    )
    print(
        f"distinct n-grams of a micro-batch of {args.symbols_per_step // args.train.accumulation:,} tokens, for each"
        " token: " + ", ".join(f"{value:.3f} (n = {n})" for n, value in unique.items())
    )
    if args.json is not None:
        lines = [asdict(line) for line in found]
        written = {"split": args.split.name, "pack": pack, "k": lines, "unique_ngrams": unique}
        try:
            write_json(Path(args.json), written)
        except OSError as error:
            raise UserError(f"json={args.json}: cannot be written ({error.strerror})") from error
        print(f"written: {args.json}")
    if args.export is not None:
        write_tables(Path(args.export), [used_rows(each)[:, : args.schedule.k_max] for each in found_tables])
        print(f"written: {args.export}")
    return 0


def used_rows(found: Table) -> Tensor:
    """Return the rows of a table that n-grams can have: all where they are hashed, else one for each n-gram."""
    return found.order_rE[: found.vocab_size**found.ngram]


def main() -> None:
    """Entry point."""
    run_program("tables", TablesArgs, tables)


if __name__ == "__main__":
    main()
