"""From documents to a sample with an n-gram table inside the model: the whole way of a run, on this machine.

    python -m examples.ngram_table FOLDER

1. documents as JSON lines, here the sources of Python's standard library, cut into BPE ids
2. a certificate for 2 ranks: rows and bytes of experts and of the table, before anything is trained
3. training on 2 ranks, held to it: hash layers with live weights, and a table of pairs and triples of ids in layer 1
4. one rank is killed after a checkpoint; the other ends by itself
5. a certificate for 3 ranks, and the run goes on there from the checkpoint
6. a sample from the result

Each step is a command of this program, printed before it runs. Ranks are started as torchrun starts them.
"""

import json
import os
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

STEPS, SAVED, KILLED_FROM = 24, 4, 8
OPTIONS = (
    *("corpus=file", "corpus.tokens=bpe", "corpus.vocab_size=400"),
    *("data.streams=6", "data.segment=32", "data.reset_memory=true"),
    *("model.layers=2", "model.width=32", "model.heads=2", "model.head_width=16", "model.memory=32"),
    *("router=hashed", "moe.experts=6", "moe.expert_width=32", "moe.ngram=2", "moe.rows=1024", "moe.weights=live"),
    *("schedule.growth=constant", "schedule.k_max=2", "eval.k=[2]", "eval.max_symbols=2000"),
    *("ngram_tables.rows=5000", "ngram_tables.heads=2", "ngram_tables.width=16", "ngram_tables.layers=[1]"),
    *(
        "optim.lr=0.002",
        "optim.warmup_steps=0",
        f"train.steps={STEPS}",
        f"train.save_every={SAVED}",
        "train.log_every=4",
        "train.name=run",
    ),
    *("kernels.masked_from_k=7", "train.threads=1"),
)


def main(folder: Path) -> None:
    """Go the whole way in a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    write_documents(folder / "documents.jsonl", 40)
    options = [
        *OPTIONS,
        f"corpus.path={folder / 'documents.jsonl'}",
        f"corpus.cache_dir={folder / 'cache'}",
        f"train.runs_dir={folder}",
    ]
    certify(folder, options, 2)
    train(folder, options, 2, killed_from=KILLED_FROM)
    certify(folder, options, 3)
    train(folder, [*options, "train.resume=true"], 3)
    run("launch.generate", f"run={folder / 'run'}", "prompt=def ", "length=40", "seed=2")


def write_documents(file: Path, number: int) -> None:
    """Write the sources of some modules, a document in each line."""
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    lines = [json.dumps({"text": module.read_text(errors="replace")[:3000]}) for module in modules[:number]]
    file.write_text("\n".join(lines) + "\n")


def certify(folder: Path, options: list[str], ranks: int) -> None:
    """Write the certificate of a run on so many ranks, all in one expert group."""
    out = folder / f"certificate-{ranks}"
    run("launch.certify", *options, f"parallel.expert_ranks={ranks}", f"world_size={ranks}", f"out={out}")


def train(folder: Path, options: list[str], ranks: int, *, killed_from: int | None = None) -> None:
    """Train on so many ranks, held to their certificate.

    Args:
        killed_from: kill the last rank when there is a checkpoint of this step or a later one.
    """
    certificate = f"certificate={folder / f'certificate-{ranks}'}"
    ends = [f"parallel.expert_ranks={ranks}", certificate, "parallel.timeout_s=20"]
    command = command_of("launch.train", *options, *ends)
    print(f"$ torchrun --nproc-per-node {ranks} {' '.join(command[1:])}", flush=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    processes = [subprocess.Popen(command, env={**os.environ, **meet, **place}) for place in places]
    if killed_from is not None:
        wait_for(folder / "run" / "checkpoints", killed_from, processes)
        print("killing a rank", flush=True)
        processes[-1].kill()
    codes = [process.wait() for process in processes]
    if any(codes) == (killed_from is None):
        raise SystemExit(f"the ranks ended with the codes {codes}")


def wait_for(checkpoints: Path, step: int, processes: list["subprocess.Popen[bytes]"]) -> None:
    """Wait for a checkpoint of this step or a later one, as long as all ranks run."""
    while all(process.poll() is None for process in processes):
        if any(int(path.name.removeprefix("step-")) >= step for path in checkpoints.glob("step-*")):
            return
        time.sleep(0.1)


def run(program: str, *options: str) -> None:
    """Run a program of this package to its end."""
    command = command_of(program, *options)
    print(f"$ {' '.join(command)}", flush=True)
    subprocess.run(command, check=True)


def command_of(program: str, *options: str) -> list[str]:
    """Return the command that starts a program."""
    return [sys.executable, "-m", program, *options]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m examples.ngram_table FOLDER")
    main(Path(sys.argv[1]))
