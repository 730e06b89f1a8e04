"""What a run will do, before it starts: `python -m launch.certify experiment=NAME world_size=64 expert_group=8`.

Replays the ids, tables and k of the run on this machine's CPU, without a GPU or a cluster: rows of every rank and expert, and
bytes inside and between nodes, exactly. Prints one page, and writes it with charts as certificate.html and every number as
certificate.json.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from engine.build import build_routers
from engine.certificate.exact import certify, counted_steps
from engine.certificate.placement import Placement
from engine.config import Config, Split, to_plain
from engine.corpus import prepare
from launch.certificate_page import certificate_page
from launch.cli import run_program
from launch.page_html import html
from launch.page_terminal import print_page


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
    out: str | None = None
    """Folder of certificate.json and certificate.html; None means certificates/ and train.name."""

    def __post_init__(self) -> None:
        if self.expert_group is not None:
            self.parallel = replace(self.parallel, expert_ranks=self.expert_group)
        super().__post_init__()
        self.placement.check(self)
        counted_steps(self, self.steps, self.sample)

    @property
    def placement(self) -> Placement:
        """Where the ranks stand."""
        return Placement(self.world_size, self.parallel.expert_ranks, self.ranks_per_node)


def run(args: CertifyArgs) -> int:
    """Count, print and write; returns the exit code."""
    corpus = prepare(args.corpus, print)
    routers = build_routers(args, corpus)
    assert routers is not None
    tables = [router.table for router in routers]
    ids = corpus.split(Split.train)
    found = certify(args, ids, tables, args.placement, steps=args.steps, sample=args.sample)
    folder = Path(args.out or Path("certificates") / args.train.name)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "certificate.json"
    plain = {"options": to_plain(args), "corpus_sha256": corpus.sha256, **asdict(found)}
    path.write_text(json.dumps(plain, indent=1) + "\n", encoding="ascii")
    described = certificate_page(found, args, corpus)
    path.with_suffix(".html").write_text(html(described), encoding="ascii")
    print_page(described)
    print(f"written: {path} and, with charts, {path.with_suffix('.html')}")
    return 0


def main() -> None:
    """Entry point."""
    run_program("certify", CertifyArgs, run)


if __name__ == "__main__":
    main()
