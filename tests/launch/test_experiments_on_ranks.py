"""The experiments for 8 and 2 x 8 GPUs, rehearsed as that many processes with shrunk widths."""

import json
from contextlib import ExitStack

import pytest

from foreroute.engine.testing.ranks import Program, rank_environments
from foreroute.launch.testing.runs import TRAIN_CODE

SHRUNK = (
    "corpus=stdlib",
    "corpus.tokens=bytes",
    "data.segment=16",
    "model.layers=2",
    "model.width=16",
    "model.heads=2",
    "model.head_width=8",
    "model.memory=16",
    "moe.expert_width=8",
    "moe.rows=512",
    "train.steps=3",
    "train.log_every=1",
    "train.save_every=0",
    "train.valid_every=0",
    "eval.k=[4]",
    "eval.max_symbols=2000",
    "eval.segment=16",
    "eval.memory=16",
    "train.threads=1",
)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("name,ranks", [("enwik8_hashed_8gpu", 8), ("enwik8_hashed_2x8gpu", 16)])
def test_rehearsal(tmp_path, name, ranks):
    options = [f"experiment={name}", f"train.runs_dir={tmp_path}", *SHRUNK]
    with ExitStack() as stack:
        programs = [stack.enter_context(Program(TRAIN_CODE, options, environ)) for environ in rank_environments(ranks)]
        (code, out, err), *others = [program.wait() for program in programs]
    assert [code, *(other[0] for other in others)] == [0] * ranks, err[-3000:]
    assert f"ranks: {ranks}, in expert groups of 8; ZeRO stage 1" in out
    rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all(row["wire_bytes"] > 0 for row in rows)
    assert (tmp_path / name / "summary.json").exists()
