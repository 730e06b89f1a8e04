"""Tables that launch.tables exports are those of a run's hashed routing, as moe.router=token_table reads them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from foreroute.engine.config import Corpus, CorpusConfig, EvalConfig, MoEConfig, ScheduleConfig, Split
from foreroute.engine.data.corpus import prepare
from foreroute.engine.model.build import build_routers
from foreroute.engine.routing.planned_router import GroupTokens
from foreroute.launch.tables import TablesArgs, tables

EXPERTS, K = 8, 3


@pytest.fixture
def args(tmp_path):
    """Of a text with a vocabulary of 64, skewed."""
    draw = (64 * np.random.default_rng(0).random(20_000) ** 2).astype(int) + 48
    (tmp_path / "text.txt").write_bytes(bytes(draw.tolist()))
    return TablesArgs(
        corpus=CorpusConfig(Corpus.file, str(tmp_path / "text.txt"), cache_dir=str(tmp_path / "cache")),
        moe=MoEConfig(experts=EXPERTS, ngram=1, rows=256),
        schedule=ScheduleConfig(k_max=K),
        eval=EvalConfig(k=[1]),
        ranks=[2],
    )


def both(args, file):
    """Routes of a text by the run's own tables and by those of the file, layer by layer."""
    assert tables(replace(args, export=str(file))) == 0
    corpus = prepare(args.corpus)
    ids = torch.randint(0, corpus.vocab.size, (1, 3, 50), generator=torch.Generator().manual_seed(1))
    group = GroupTokens(ids, ids[:, :, :2])
    read = replace(args.moe, router="token_table", options={"file": str(file)}, rows=1)
    found = [build_routers(replace(args.alone(), moe=moe), corpus) for moe in (args.moe, read)]
    for one, other in zip(*found, strict=True):
        yield one, *(router.route(group, K).expert_TK for router in (one, other))


@pytest.mark.parametrize("ngram", [1, 2])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("ending", ["npy", "safetensors"])
def test_exported_tables_route_as_those_of_the_run(args, ngram, share, ending, tmp_path, capsys):
    args.moe = replace(args.moe, ngram=ngram, share_table=share)
    file, found = tmp_path / f"tables.{ending}", []
    for _, own, again in both(args, file):
        assert torch.equal(own, again)
        found.append(own)
    assert capsys.readouterr().out.splitlines()[-1] == f"written: {file}"
    assert len(found) == (1 if share else args.model.layers)
    assert all(not torch.equal(found[0], other) for other in found[1:])


def test_distinct_ngrams_of_a_micro_batch_are_printed_and_written(args, tmp_path, capsys):
    file = tmp_path / "found.json"
    assert tables(replace(args, json=str(file))) == 0
    unique = json.loads(file.read_text())["unique_ngrams"]
    said = ", ".join(f"{unique[n]:.3f} (n = {n})" for n in "123")
    tokens = args.data.streams * args.data.segment
    line = f"distinct n-grams of a micro-batch of {tokens:,} tokens, for each token: {said}"
    assert line in capsys.readouterr().out.splitlines()
    assert unique["1"] <= 64 / tokens and 0 < unique["1"] < unique["2"] < unique["3"] < 1


def test_with_one_id_as_the_key_it_is_tid2eid(args, tmp_path):
    """[ids, k], int64; and balanced on the text."""
    args.moe = replace(args.moe, share_table=True)
    ((router, *_),) = both(args, tmp_path / "t.npy")
    table, corpus = np.load(tmp_path / "t.npy"), prepare(args.corpus)
    assert table.dtype == np.int64 and table.shape == (corpus.vocab.size, K)
    assert np.array_equal(table, router.table.order_rE[: corpus.vocab.size, :K])
    ids = corpus.split(Split.train)
    count_E = np.bincount(table[ids].flatten(), minlength=EXPERTS)
    drawn = np.stack([np.random.default_rng(row).permutation(EXPERTS)[:K] for row in range(len(table))])
    assert count_E.max() / count_E.mean() < 1.1 < np.bincount(drawn[ids].flatten()).max() / count_E.mean()
