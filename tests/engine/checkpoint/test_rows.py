"""Rows of n-gram tables in checkpoints: bit for bit, from any number of ranks to any other, in parts."""

import json

import numpy as np
import pytest
import torch

from foreroute.engine.checkpoint import files, rows
from foreroute.engine.checkpoint.parameters import Reader
from foreroute.engine.config import RowMoments, RowUpdates
from foreroute.engine.errors import UserError
from foreroute.engine.ngram_tables.row_rules import RowAdam, RowRule, RowSGD
from foreroute.engine.ngram_tables.store import RowStore
from foreroute.engine.parallel.cpu_group import CpuGroup
from foreroute.engine.testing.ranks import run_threads

SIZES = ((53, 4), (7, 3))  # rows and width of each table; of 8 ranks some have no row of the second
RULES = (RowAdam(), RowAdam(updates=RowUpdates.step, moments=RowMoments.row))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(rows, "_MOST_NUMBERS", 40)  # 10 rows of the first table, 13 of the second


def stores(rank: int, world: int, *, seed: int = 1, rules: tuple[RowRule, ...] = RULES) -> list[RowStore]:
    return [
        RowStore(size, width, rank=rank, world=world, seed=seed, index=table, scale=1.0, rule=rule)
        for table, ((size, width), rule) in enumerate(zip(SIZES, rules, strict=True))
    ]


def trained(rank: int, world: int) -> list[RowStore]:
    """After 6 steps on rows that all ranks know."""
    found = stores(rank, world)
    for table, store in enumerate(found):
        gen = np.random.default_rng(table)
        for step in range(1, 7):
            row_U = gen.permutation(store.rows)[: store.rows // 2]
            grad_UW = torch.from_numpy(gen.normal(size=(row_U.size, store.width))).float()
            own_U = torch.from_numpy(row_U % world == rank)
            store.update(torch.from_numpy(row_U)[own_U] // world, grad_UW[own_U], step=step, lr=0.1)
    return found


def save(folder, world: int):
    """The checkpoint of a run's ranks, here threads."""
    target = folder / f"of-{world}"

    def write(group: CpuGroup) -> None:
        own = trained(group.rank, world)
        header = {"format": files.FORMAT, "ranks": world, rows.TABLES: rows.describe_rows(own)}
        files.write_whole(
            target, group, lambda: dict(rows.own_rows(own)), lambda _: header, temporary=f".writing-{world}"
        )

    for failure in run_threads(write, world):
        assert failure is None, failure
    return target


def load(path, rank: int, world: int, found: list[RowStore] | None = None) -> list[RowStore]:
    found = stores(rank, world, seed=99) if found is None else found
    rows.load_rows(Reader(path, CpuGroup()), found)
    return found


@pytest.mark.parametrize("saved_by", [1, 3, 4, 8])
def test_any_ranks_read_what_any_ranks_wrote(tmp_path, saved_by):
    path = save(tmp_path, saved_by)
    for world in (1, 2, 3, 4, 8):
        for rank in range(world):
            for got, want in zip(load(path, rank, world), trained(rank, world), strict=True):
                assert list(got.state) == list(want.state)
                for kind, kept in got.state.items():
                    assert kept.dtype == want.state[kind].dtype and torch.equal(kept, want.state[kind])
    # negative control: before it was loaded
    assert not torch.equal(stores(0, 1, seed=99)[0].state["value"], trained(0, 1)[0].state["value"])


def test_rows_are_stored_by_their_numbers(tmp_path):
    path = save(tmp_path, 3)
    keys = files.read_manifest(path)["tensors"]
    assert keys["ngram_rows/0/value/000000000010/00002"]["shape"] == [3, 4]  # of 10 to 19 rank 2 has 11, 14 and 17
    assert keys["ngram_rows/0/count/000000000050/00000"]["shape"] == [1, 1]  # the last part has 50, 51 and 52
    assert keys["ngram_rows/1/exp_avg_sq/000000000000/00001"]["shape"] == [2, 1]
    found = Reader(path, CpuGroup()).get("ngram_rows/0/value/000000000010/00002")
    assert torch.equal(found, trained(0, 1)[0].state["value"][[11, 14, 17]])
    assert not any("count" in key for key in keys if key.startswith("ngram_rows/1"))


def test_ranks_of_a_common_divisor_read_only_what_they_need(tmp_path, monkeypatch):
    """Rank 1 of 2 has no row that the ranks 0 and 2 of 4 had."""
    path, read = save(tmp_path, 4), set()
    reader = Reader(path, CpuGroup())
    get = reader.get

    def watched(key):
        read.add(key.rpartition("/")[2])
        return get(key)

    monkeypatch.setattr(reader, "get", watched)
    rows.load_rows(reader, stores(1, 2))
    assert read == {"00001", "00003"}


def test_values_alone(tmp_path):
    """As an evaluation reads them, which has no state."""
    found = stores(0, 1, rules=(RowSGD(), RowSGD()))
    reader = Reader(save(tmp_path, 3), CpuGroup())
    rows.load_values(reader, found)
    for got, want in zip(found, trained(0, 1), strict=True):
        assert torch.equal(got.state["value"], want.state["value"])


@pytest.mark.parametrize("what", ["a byte", "a row less"])
def test_damage_is_found(tmp_path, what):
    path = save(tmp_path, 3)
    file = path / files.shard_name(1)
    content = bytearray(file.read_bytes())
    if what == "a byte":
        content[-20] ^= 1
    file.write_bytes(content if what == "a byte" else content[:-16])
    with pytest.raises(UserError, match=r"shard-00001.safetensors: (sha256 differs|\d+ bytes instead of)"):
        Reader(path, CpuGroup())


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: stores(0, 1)[:1], "it has 2 n-gram tables, the model 1$"),
        (lambda: [], "it has 2 n-gram tables, the model 0$"),
        (
            lambda: [RowStore(54, 4, rank=0, world=1, seed=1, index=0, scale=1, rule=RULES[0]), stores(0, 1)[1]],
            "rows of n-gram table 0 is 53 in the checkpoint, 54 here",
        ),
        (
            lambda: [stores(0, 1)[0], RowStore(7, 5, rank=0, world=1, seed=1, index=1, scale=1, rule=RULES[1])],
            "width of n-gram table 1 is 3 in the checkpoint, 5 here",
        ),
        (
            lambda: stores(0, 1, rules=(RULES[1], RULES[1])),
            r"state of n-gram table 0 is .*'count': \[1\].* in the checkpoint, .*'exp_avg_sq': \[1\]\} here",
        ),
    ],
)
def test_other_tables_are_refused(tmp_path, made, message):
    with pytest.raises(UserError, match=f"of-1 does not fit this model: {message}"):
        load(save(tmp_path, 1), 0, 1, made())


def test_a_checkpoint_without_tables(tmp_path):
    """As those that were written before there were any."""
    path = save(tmp_path, 1)
    manifest = json.loads((path / files.MANIFEST).read_text())
    assert manifest.pop(rows.TABLES)
    reader = Reader(path, CpuGroup())
    reader.manifest.pop(rows.TABLES)
    rows.load_rows(reader, [])
    with pytest.raises(UserError, match="it has 0 n-gram tables, the model 2"):
        rows.load_rows(reader, stores(0, 1))
