"""What a run will do, before it starts: `python -m launch.certify experiment=NAME world_size=64 expert_group=8`.

Replays the ids, tables and k of the run on this machine's CPU, without a GPU or a cluster: rows of every rank and expert, and
bytes inside and between nodes, exactly; and the memory of a rank, by formula. Prints one page and writes certificate.json.
Numbers of rows are of one layer and micro-batch unless said.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from engine.build import build_routers
from engine.certificate.exact import Bytes, Certificate, Idle, Section, certify, counted_steps
from engine.certificate.memory import Memory, predict
from engine.certificate.placement import Placement
from engine.certificate.tally import Spread
from engine.certificate.traffic import KINDS
from engine.config import Config, Split, require, to_plain
from engine.corpus import prepare
from launch.cli import run_program
from launch.console import table
from launch.memory_page import memory_heading, memory_table, verdict_line


@dataclass
class CertifyArgs(Config):
    """Options: a run's configuration, the ranks it is to run on, and what to count."""

    world_size: int = 1
    """Ranks of the run."""
    expert_group: int | None = None
    """Ranks of an expert group; None means parallel.expert_ranks."""
    ranks_per_node: int = 8
    steps: int | None = None
    """Count the first so many steps; None means train.steps."""
    sample: int = 1
    """Count every so manieth step only."""
    device_memory_gb: float | None = None
    """Memory of a rank's device in 1e9 bytes: says whether the run fits, on a GPU unless kernels.backend=cpu. None: no verdict."""
    out: str | None = None
    """Folder of certificate.json; None means certificates/ and train.name."""

    def __post_init__(self) -> None:
        if self.expert_group is not None:
            self.parallel = replace(self.parallel, expert_ranks=self.expert_group)
        super().__post_init__()
        self.placement.check(self)
        counted_steps(self, self.steps, self.sample)
        memory_gb = self.device_memory_gb
        require(
            memory_gb is None or memory_gb > 0, f"device_memory_gb={memory_gb}: must be above 0"
        )

    @property
    def device_memory_bytes(self) -> int | None:
        """Memory of a rank's device."""
        return None if self.device_memory_gb is None else int(self.device_memory_gb * 1e9)

    @property
    def placement(self) -> Placement:
        """Where the ranks stand."""
        return Placement(self.world_size, self.parallel.expert_ranks, self.ranks_per_node)


def page(found: Certificate, memory: Memory) -> str:
    """Lay out a certificate for a terminal."""
    sections = [*found.by_k, found.whole] if len(found.by_k) > 1 else found.by_k
    parts = [*_heading(found), "", "Rows"]
    parts += [_rows(sections), "", "Padding, if every step had the same shapes", _static(sections)]
    parts += ["", "Bytes of a rank in a step, all layers and directions, MB (1e6)", _bytes(sections)]  # fmt: skip
    parts += ["", memory_heading(memory), table(*memory_table(memory)), verdict_line(memory)]
    return "\n".join(parts)


def _heading(found: Certificate) -> list[str]:
    place = found.placement
    nodes = "1 node" if place.group_nodes == 1 else f"{place.group_nodes} nodes"
    groups = "1 expert group" if place.groups == 1 else f"{place.groups} expert groups"
    counted = found.whole.steps
    if found.sample == 1:
        scope = f"steps: the first {found.steps:,}, all counted"
    else:
        scope = (
            f"steps: {counted:,} of the first {found.steps:,}, one in {found.sample}: maxima, bounds and empty steps are of "
            "these alone"
        )
    return [
        f"ranks: {place.world_size}, {place.ranks_per_node} on a node, in {groups} of {place.expert_ranks}, each on {nodes}; "
        f"{found.experts // place.expert_ranks} of {found.experts} experts on a rank",
        f"a rank: {found.tokens:,} tokens in a micro-batch, {found.layers} layers, {found.row_bytes:,} bytes a row; rows go to "
        f"experts {found.trips.to_experts} times a step and layer, results come back {found.trips.to_tokens} times",
        scope,
        _nothing("a rank receives no row", found.whole.idle_rank, counted),
        _nothing("an expert gets no row", found.whole.idle_expert, counted),
    ]


def _nothing(what: str, idle: Idle, steps: int) -> str:
    if not idle.steps:
        return f"steps in which {what}: none"
    return f"steps in which {what}: {idle.steps:,} of {steps:,}, first step {idle.first_step:,}"


def _spread(spread: Spread, show: Callable[[float], str]) -> list[str]:
    return [show(spread.mean), show(spread.p99), show(spread.max), f"{spread.worst_step:,}"]


def _name(section: Section) -> str:
    return "all" if section.k is None else str(section.k)


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _rows(sections: list[Section]) -> str:
    header = ["k", "steps", "what", "mean", "p99", "max", "worst step"]
    rows = []
    for section in sections:
        for what, spread in (
            ("received by a rank", section.received_rows),
            ("computed by a rank", section.computed_rows),
            ("of an expert", section.expert_rows),
        ):
            rows.append([_name(section), _whole(section.steps), what, *_spread(spread, _whole)])
    return table(header, rows)


def _static(sections: list[Section]) -> str:
    header = ["k", "rank to rank", "padding", "of an expert", "padding"]
    rows = []
    for section in sections:
        static = section.static
        row = [_whole(static.pair_rows), f"{static.pair_padding:.1%}"]
        row += [_whole(static.expert_rows), f"{static.expert_padding:.1%}"]
        rows.append([_name(section), *row])
    return table(header, rows)


def _bytes(sections: list[Section]) -> str:
    def show(value: float) -> str:
        return f"{value / 1e6:,.3f}"

    header = ["k", "exchange", "mean", "p99", "max", "worst step", "in node", "between", "max between"]  # fmt: skip
    rows = []
    for section in sections:
        for kind in KINDS:
            found: Bytes = section.bytes[kind]
            mark = "*" if kind == section.exchange else ""
            row = [_name(section), kind + mark, *_spread(found.rank, show)]
            rows.append([*row, *(show(n) for n in (found.inside.mean, found.between.mean, found.between.max))])  # fmt: skip
    return table(header, rows) + "\n* the exchange that the run uses"


def run(args: CertifyArgs) -> int:
    """Count, print and write; returns the exit code."""
    corpus = prepare(args.corpus, print)
    routers = build_routers(args, corpus)
    assert routers is not None
    tables = [router.table for router in routers]
    ids = corpus.split(Split.train)
    found = certify(args, ids, tables, args.placement, steps=args.steps, sample=args.sample)
    vocab, device_bytes = corpus.vocab.size, args.device_memory_bytes
    memory = predict(args, found, vocab, device_memory_bytes=device_bytes)
    folder = Path(args.out or Path("certificates") / args.train.name)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "certificate.json"
    plain = {"options": to_plain(args), "corpus_sha256": corpus.sha256, **asdict(found)}
    plain["memory"] = asdict(memory)
    path.write_text(json.dumps(plain, indent=1) + "\n", encoding="ascii")
    print(page(found, memory))
    print(f"written to {path}")
    return 0


def main() -> None:
    """Entry point."""
    run_program("certify", CertifyArgs, run)


if __name__ == "__main__":
    main()
