"""Fetch and tokenise a corpus ahead of training: `python -m launch.prepare corpus=enwik8`."""

from dataclasses import dataclass, field

from tqdm import tqdm

from foreroute.engine.config import Corpus, CorpusConfig, Split
from foreroute.engine.data.corpus import prepare
from foreroute.engine.data.download import download_enwik8, enwik8_copy
from foreroute.launch.start.cli import run_program


@dataclass
class PrepareArgs:
    """Options: the corpus section of a run."""

    corpus: CorpusConfig = field(default_factory=CorpusConfig)


def prepare_corpus(args: PrepareArgs) -> int:
    """Download if needed, tokenise, split, and print the sizes; returns the exit code."""
    config = args.corpus
    if config.name is Corpus.enwik8 and config.path is None:
        with tqdm(unit="B", unit_scale=True, desc="enwik8", disable=None) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            try:
                download_enwik8(enwik8_copy(config), progress=progress)
            except SystemExit:  # a signal
                bar.close()
                print("stopped; what has arrived is kept, and the same command goes on from there")
                raise
    corpus = prepare(config, print)
    for line in corpus.notes:
        print(line)
    parts = ", ".join(f"{split.name} {len(corpus.split(split)):,}" for split in Split)
    print(f"{config.name.name} ({config.tokens.name}, {corpus.vocab.size:,} symbols): {parts}")
    print(f"sha256 {corpus.sha256}")
    return 0


def main() -> None:
    """Entry point."""
    run_program("prepare", PrepareArgs, prepare_corpus)


if __name__ == "__main__":
    main()
