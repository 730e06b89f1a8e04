"""Checkpoints of four gloo ranks as files: who writes what, one verdict for all ranks, refusal of what does not fit."""

import json
import resource
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import distributed as dist
from torch import nn

from foreroute.engine.checkpoint import files
from foreroute.engine.checkpoint import save_load as checkpoint
from foreroute.engine.checkpoint.save_load import STATE_KEYS, TrainingState
from foreroute.engine.errors import UserError
from foreroute.engine.parallel.cpu_group import GlooGroup
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.sealed_files import checksum
from foreroute.engine.testing.ranks import run_ranks

RANKS, GROUP, EXPERTS = 4, 2, 4
SHAPES = {"out": (5, 3), "x.experts.w1": (EXPERTS, 2, 3), "bias": (7,), "x.experts.b1": (EXPERTS, 2)}
STREAMS = {0: [3, 1], 1: [0], 2: [4, 5], 3: [2]}  # of each rank, in its order


class PlainEngine:
    """What a checkpoint needs of an engine; the experts are shared out as the mesh says."""

    def __init__(self, mesh, seed=0):
        self.mesh, self.adam = mesh, 3
        self.state = {}
        generator = torch.Generator().manual_seed(seed)
        for name, shape in SHAPES.items():
            values = {key: torch.randn(shape, generator=generator) for key in STATE_KEYS}
            if ".experts." in name:
                own = mesh.local_experts(EXPERTS)
                values = {key: value[own.start : own.stop] for key, value in values.items()}
            self.state[name] = values
        self.module = nn.Module()
        self.module.register_buffer("gate", torch.randn(3, generator=generator))

    def shapes(self):
        return {name: tuple(values["weight"].shape) for name, values in self.state.items()}

    def read_state(self):
        yield from self.state.items()

    def write_state(self, name, values):
        self.state[name] = dict(values)

    def adam_step(self):
        return self.adam

    def set_adam_step(self, step):
        self.adam = step


def stream_memory(stream):
    return torch.full((3, 2), float(stream))


def training_state(step, rank, streams):
    layers = [torch.stack([layer * 10 + stream_memory(s) for s in streams]) for layer in range(2)]
    rng = torch.full((4,), rank, dtype=torch.uint8)
    tables = [{"order": torch.arange(5)}]
    return TrainingState(step, step, rng, tuple(layers), torch.tensor(streams), tables)


def outcome(act):
    """What a call gives, or how it fails."""
    try:
        return act()
    except (OSError, RuntimeError, UserError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def four_ranks(rank, ranks, folder):
    """One rank's part of all that is tried."""
    mesh, cpu_group, found = Mesh(rank, ranks, GROUP), GlooGroup(dist.group.WORLD), {}
    engine = PlainEngine(mesh)

    def save(step, streams=STREAMS[rank], cpu_group=cpu_group, keep=9):
        state, facts = training_state(step, rank, streams), {"rank": rank}
        return str(checkpoint.save(folder, engine, state, facts=facts, keep=keep, cpu_group=cpu_group))

    def attempt(name, act):
        found[name] = outcome(act)
        cpu_group.barrier()
        found[name, "left"] = sorted(path.name for path in folder.iterdir())
        cpu_group.barrier()

    attempt("alone", lambda: save(4, cpu_group=None))
    attempt("saved", lambda: save(4))
    attempt("same stream twice", lambda: save(8, [rank // 2]))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name, full, size in (("shard", 2, 500), ("manifest", 0, 4500)):
        if rank == full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        attempt(f"disk full at the {name}", lambda: save(8))
        if rank == full:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    attempt("saved later", lambda: save(8))
    stuck = folder / "step-00000001"
    if rank == 0:
        stuck.touch()  # no folder, so it cannot be removed like one
    attempt("an older one stays", lambda: save(8, keep=2))
    if rank == 0:
        stuck.unlink()
        shard = folder / "step-00000008" / files.shard_name(3)
        shard.write_bytes(shard.read_bytes()[:-9])
    cpu_group.barrier()
    attempt("newest", lambda: checkpoint.find_newest(folder, cpu_group))
    path = folder / "step-00000004"
    attempt("damaged", lambda: checkpoint.load(folder / "step-00000008", engine, cpu_group=cpu_group))
    attempt("no such stream", lambda: checkpoint.load(path, engine, cpu_group=cpu_group, streams=[rank, 4 + rank]))
    for group in (GROUP, 4):
        attempt(
            f"loaded in groups of {group}", lambda group=group: list(faults(path, Mesh(rank, ranks, group), cpu_group))
        )
    return found


def faults(path, mesh, cpu_group):
    """Load with other streams than this rank saved; say what differs from the truth."""
    engine, wanted = PlainEngine(mesh, seed=1), PlainEngine(mesh)
    engine.adam, streams = 0, STREAMS[3 - mesh.rank][::-1]
    state, truth = (
        checkpoint.load(path, engine, cpu_group=cpu_group, streams=streams),
        training_state(4, mesh.rank, streams),
    )
    for name, values in wanted.state.items():
        yield from (f"{key}/{name}" for key, v in values.items() if not torch.equal(engine.state[name][key], v))
    same = {
        "adam step": engine.adam == 3,
        "buffer": torch.equal(engine.module.gate, wanted.module.gate),
        "streams": state.stream_B.tolist() == streams,
        "memory": all(torch.equal(a, b) for a, b in zip(state.memory, truth.memory, strict=True)),
        "table": torch.equal(state.tables[0]["order"], torch.arange(5)),
        "rng": torch.equal(state.rng, truth.rng) if mesh.ep_size == GROUP else state.rng is None,
    }
    yield from (what for what, fine in same.items() if not fine)


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    return folder, run_ranks(four_ranks, RANKS, RANKS, folder)


def whole():
    return PlainEngine(Mesh())


@pytest.mark.dist
def test_each_rank_writes_its_share(tried):
    path = tried[0] / "step-00000004"
    held = {}
    for rank in range(RANKS):
        with safe_open(path / files.shard_name(rank), "pt") as shard:
            held[rank] = {key: shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118
    weights = {r: {k.removeprefix("weight/") for k in keys if k.startswith("weight/")} for r, keys in held.items()}
    assert weights == {  # parameters 0 and 2 are dense; expert j of a slice goes to the replica j mod 2
        0: {"out", "x.experts.w1/00000", "x.experts.b1/00000"},
        1: {"x.experts.w1/00002", "x.experts.b1/00002"},
        2: {"bias", "x.experts.w1/00001", "x.experts.b1/00001"},
        3: {"x.experts.w1/00003", "x.experts.b1/00003"},
    }
    assert {r: [k for k in keys if k.startswith("rng/")] for r, keys in held.items()} == {
        r: [f"rng/torch/rank-{r:05d}"] for r in range(RANKS)
    }
    for rank, streams in STREAMS.items():
        found = {key for key in held[rank] if key.startswith("memory/")}
        assert found == {f"memory/{layer}/{s:06d}" for layer in range(2) for s in streams}
    assert {r for r, keys in held.items() if "buffer/gate" in keys or "table/0/order" in keys} == {0}
    together = {key: value for keys in held.values() for key, value in keys.items()}
    assert len(together) == sum(map(len, held.values()))
    for name, values in whole().state.items():
        for key, value in values.items():
            if ".experts." in name:
                parts = [together[f"{key}/{name}/{expert:05d}"] for expert in range(EXPERTS)]
                assert torch.equal(torch.stack(parts), value)
            else:
                assert torch.equal(together[f"{key}/{name}"], value)
    assert checkpoint.read_manifest(path)["rank"] == 0  # rank 0's facts


@pytest.mark.dist
def test_all_ranks_fail_together_and_leave_nothing(tried):
    folder, answers = tried
    for rank, found in enumerate(answers):
        assert found["alone"] == f"ValueError: cpu_group is rank 0 of 1, the engine {rank} of 4"
        assert found["saved"] == str(folder / "step-00000004")
        assert "RuntimeError: memory/0/000000 is in shard-00000" in found["same stream twice"]
        for full, what in ((2, "shard"), (0, "manifest")):
            message = found[f"disk full at the {what}"]
            assert message.startswith("OSError: checkpoint") and f"written: rank {full}: " in message
            assert "step-00000008 could not be" in message
        for what in ("saved", "same stream twice", "disk full at the shard", "disk full at the manifest"):
            assert found[what, "left"] == ["step-00000004"]
        assert found["saved later"] == str(folder / "step-00000008")
        message = found["an older one stays"]
        assert message.startswith("OSError: rank 0: ") and "step-00000001" in message


@pytest.mark.dist
def test_all_ranks_take_the_same_checkpoint(tried):
    folder, answers = tried
    for found in answers:
        path, (warning,) = found["newest"]
        assert path == folder / "step-00000004" and "step-00000008/shard-00003" in warning
        assert found["newest"] == answers[0]["newest"]
        assert found["damaged"].startswith("UserError") and "bytes instead of" in found["damaged"]
        assert "holds no memory of streams [6, 7]" in found["no such stream"]


@pytest.mark.dist
@pytest.mark.parametrize("group", [GROUP, 4])
def test_each_rank_loads_what_it_holds(group, tried):
    for found in tried[1]:
        assert found[f"loaded in groups of {group}"] == []


def rewrite(path, change):
    """Change the tensors of a checkpoint; every checksum is right again."""
    manifest = json.loads((path / files.MANIFEST).read_text())
    header = {k: v for k, v in manifest.items() if k not in ("files", "tensors", "checksum")}
    shards = {}
    for name in manifest["files"]:
        tensors = load_file(path / name)
        change(tensors)
        shards[name] = files.write_shard(path / name, tensors)
    files.write_manifest(path, header, shards)


def without_an_expert(tensors):
    for key in [key for key in tensors if key.endswith("w1/00003")]:
        del tensors[key]


def with_one_more(tensors):
    tensors.update({k.replace("00003", "00004"): v.clone() for k, v in tensors.items() if k.endswith("w1/00003")})


def with_another_shape(tensors):
    tensors.update({k: v.T.contiguous() for k, v in tensors.items() if k.endswith("exp_avg/x.experts.w1/00002")})


def fewer_experts(tensors):
    for key in [key for key in tensors if ".experts." in key and key[-1] in "23"]:
        del tensors[key]


@pytest.mark.dist
@pytest.mark.parametrize(
    "change,why",
    [
        (without_an_expert, r"w1/00003 has shape none in the checkpoint, \[2, 3\] here"),
        (with_one_more, r"w1/00004 has shape \[2, 3\] in the checkpoint, none here"),
        (with_another_shape, r"exp_avg/x.experts.w1/00002 has shape \[3, 2\].*\[2, 3\] here"),
        (fewer_experts, "w1/00002 has shape none"),
    ],
)
def test_experts_that_do_not_fit_are_refused(change, why, tried, tmp_path):
    path = tmp_path / "step-00000004"
    shutil.copytree(tried[0] / "step-00000004", path)
    engine = PlainEngine(Mesh(), seed=1)
    rewrite(path, lambda tensors: None)
    checkpoint.load(path, engine)  # as it was
    assert torch.equal(engine.state["x.experts.w1"]["weight"], whole().state["x.experts.w1"]["weight"])
    rewrite(path, change)
    before = {name: dict(values) for name, values in engine.state.items()}
    with pytest.raises(UserError, match=f"does not fit this model: .*{why}"):
        checkpoint.load(path, engine)
    assert all(engine.state[name][key] is value for name in before for key, value in before[name].items())


@pytest.mark.dist
def test_a_manifest_that_lists_more_than_there_is(tried, tmp_path):
    path = tmp_path / "step-00000004"
    shutil.copytree(tried[0] / "step-00000004", path)
    manifest = checkpoint.read_manifest(path)
    key = "weight/x.experts.w1/00001"
    manifest["tensors"][key]["file"] = files.shard_name(1)
    manifest["checksum"] = checksum(manifest)
    (path / files.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="holds other tensors than the manifest says"):
        checkpoint.load(path, whole())


def test_a_checkpoint_that_does_not_say_how_many_ranks(tmp_path):
    """Written by one rank, as before many could."""
    path = checkpoint.save(tmp_path, whole(), training_state(4, 7, [0, 1]), facts={}, keep=1)
    manifest = json.loads((path / files.MANIFEST).read_text())
    del manifest["ranks"], manifest["expert_ranks"], manifest["checksum"]
    manifest["checksum"] = checksum(manifest)
    (path / files.MANIFEST).write_text(json.dumps(manifest))
    engine = PlainEngine(Mesh(), seed=1)
    state = checkpoint.load(path, engine)
    assert state.rng is not None and state.rng.tolist() == [7] * 4
    assert torch.equal(engine.state["bias"]["exp_avg"], whole().state["bias"]["exp_avg"])
