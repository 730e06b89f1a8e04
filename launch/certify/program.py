"""Certify a run before it starts: `python -m launch.certify experiment=NAME world_size=64 expert_group=8`.

Replays the ids, tables and k of the run on this machine's CPU, without a GPU or a cluster. Counts the rows of every
rank and expert and the bytes inside and between nodes exactly, and the memory of a rank by formula. With cluster=NAME
it also tests whether the run fits there, and models its time. Prints the key figures. Writes certificate.html with
charts, certificate.md as text, certificate.json with every number, and certificate.safetensors with the rows and bytes
of each rank in each step, to which launch.train certificate=FOLDER holds the run.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from foreroute.engine.certificate.counts.exact import Certificate, certify
from foreroute.engine.certificate.memory.peak import Memory, peak_memory
from foreroute.engine.certificate.record import ARRAYS, JSON, Record, tables_sha256
from foreroute.engine.certificate.time.forecast import Forecaster, TimePart, time_part
from foreroute.engine.config import Backend, MoEConfig, Split, to_plain
from foreroute.engine.config.option import option
from foreroute.engine.data.corpus import PreparedCorpus, prepare
from foreroute.engine.model.build import build_routers
from foreroute.engine.ngram_tables.tables import table_keys
from foreroute.engine.routing.planned_router import PlannedRouter
from foreroute.launch.certify.counts_page import certificate_page, counts_verdict
from foreroute.launch.certify.memory_section import memory_section, memory_verdict
from foreroute.launch.certify.time_section import layout_verdict, time_figure, time_section
from foreroute.launch.page.html_file import html
from foreroute.launch.page.markdown_file import markdown
from foreroute.launch.page.terminal import print_top
from foreroute.launch.start.cli import run_program
from foreroute.launch.start.on_ranks import OnRanks, check_folder
from foreroute.launch.start.options import command_option

HTML, TEXT = "certificate.html", "certificate.md"


@dataclass
class CertifyArgs(OnRanks):
    """Options: a run's configuration, the ranks it is to run on, and what to count."""

    search: bool = option(
        True, "Model other layouts on these ranks too, and name the fastest; with tables of its own for some."
    )
    out: str | None = option(None, "Folder of what is written; None means certificates/ and train.name.")


def run(args: CertifyArgs) -> int:
    """Count, print and write; return the exit code."""
    folder = Path(args.out or Path("certificates") / args.train.name)
    check_folder(folder)
    corpus = prepare(args.corpus, print)
    layout, ids = args.layout, corpus.split(Split.train)
    layout.check()
    routers = build_routers(layout.config, corpus) or []
    keys = table_keys(args.ngram_tables, corpus.vocab.size, args.train.seed)
    record = Record(layout, ids, layout.counted_steps(args.steps, args.sample))
    found = certify(
        layout,
        ids,
        routers,
        document_starts=corpus.document_starts(Split.train),
        steps=args.steps,
        sample=args.sample,
        table_keys=keys,
        also=record.add,
    )
    memory, time = _memory(args, found, corpus), _time(args, corpus)
    plain = {
        "options": to_plain(args),
        "corpus_sha256": corpus.sha256,
        "tables_sha256": tables_sha256(routers, keys),
        **asdict(found),
        "memory": asdict(memory),
        "time_model": time and asdict(time),
    }
    arrays_bytes = record.write(folder, plain)
    figures, further = [], [memory_section(memory)]
    if time is not None and args.cluster is not None:
        figures.append(time_figure(time))
        further.append(time_section(time, args.cluster, layout.placement))
    verdicts = [memory_verdict(memory), counts_verdict(found), *([layout_verdict(time)] if found.layers else [])]
    described = certificate_page(found, layout, corpus, further, figures, verdicts)
    (folder / HTML).write_text(html(described), encoding="ascii")
    (folder / TEXT).write_text(markdown(described)[0])
    print_top(described)
    print(f"all of it: {folder / HTML} with charts, {folder / TEXT} as text, {folder / JSON}")
    print(
        f"launch.train {command_option('certificate', folder)} holds the run to {ARRAYS} ({arrays_bytes:,} bytes) there"
    )
    return 0


def _memory(args: CertifyArgs, found: Certificate, corpus: PreparedCorpus) -> Memory:
    layout, config = args.layout, args.layout.config
    if args.cluster is not None and args.cluster.host_copies and config.kernels.backend is Backend.auto:
        layout = replace(layout, config=replace(config, kernels=replace(config.kernels, backend=Backend.cpu)))
    return peak_memory(layout, found, corpus.vocab.size, device_memory_bytes=args.device_memory_bytes)


def _time(args: CertifyArgs, corpus: PreparedCorpus) -> TimePart | None:
    """Model the time; None without a cluster."""
    if args.cluster is None:
        return None
    layout = args.layout

    def routers_of(moe: MoEConfig) -> Sequence[PlannedRouter]:
        return build_routers(replace(layout.config, moe=moe), corpus) or []

    ids, starts = corpus.split(Split.train), corpus.document_starts(Split.train)
    forecaster = Forecaster(layout, args.cluster, ids, corpus.vocab.size, routers_of, starts)
    return time_part(forecaster, search=args.search)


def main() -> None:
    """Entry point."""
    run_program("certify", CertifyArgs, run)


if __name__ == "__main__":
    main()
