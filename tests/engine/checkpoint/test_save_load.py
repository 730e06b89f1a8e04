"""Resume equals never having stopped, bit for bit; damage is found; keys are by global expert id; writing is atomic."""

import copy
import gc
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from foreroute.engine.checkpoint import files
from foreroute.engine.checkpoint import save_load as checkpoint
from foreroute.engine.checkpoint.parameters import parameter_keys
from foreroute.engine.checkpoint.save_load import TrainingState
from foreroute.engine.config import Config, DataConfig, OptimConfig, Precision, TrainConfig, to_plain
from foreroute.engine.errors import UserError
from foreroute.engine.optim.deepspeed_engine import Engine, start
from foreroute.engine.sealed_files import checksum


@pytest.fixture(autouse=True)
def side_effects(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's bf16 optimizer collects garbage four times at its start: pass over what is imported. ZeRO-3 replaces
    torch.nn.functional.linear in the whole process: put it back."""
    gc.freeze()
    monkeypatch.setattr(nn.functional, "linear", nn.functional.linear)


class Experts(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(experts, 5, 8) * 0.4)
        self.b1 = nn.Parameter(torch.randn(experts, 5) * 0.1)
        self.w2 = nn.Parameter(torch.randn(experts, 5, 8) * 0.4)
        self.b2 = nn.Parameter(torch.randn(experts, 8) * 0.1)

    def forward(self, x_TD: Tensor) -> Tensor:
        hidden_ETF = torch.relu(torch.einsum("td,efd->etf", x_TD, self.w1) + self.b1[:, None])
        hidden_ETF = nn.functional.dropout(hidden_ETF, 0.3)
        return (torch.einsum("etf,efd->etd", hidden_ETF, self.w2) + self.b2[:, None]).mean(0)


class Tiny(nn.Module):
    def __init__(self, seed: int = 0, experts: int = 3) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([nn.ModuleDict({"moe": nn.ModuleDict({"experts": Experts(experts)})})])
        self.out = nn.Linear(8, 11)
        self.register_buffer("gate_weight", torch.randn(3, 8))
        self.register_buffer("position", torch.arange(4.0), persistent=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = nn.functional.dropout(self.embed(ids).flatten(0, 1), 0.2)
        x = x + self.get_submodule("blocks.0.moe.experts")(x)
        return nn.functional.cross_entropy(self.out(x).float(), targets.flatten())


def config(stage: int = 1, precision: Precision = Precision.fp32) -> Config:
    return Config(
        data=DataConfig(streams=4, segment=6),
        optim=OptimConfig(lr=0.01, clip=0.25 if stage else 0.0),
        train=TrainConfig(zero_stage=stage, precision=precision),
    )


def train(engine: Engine, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        ids = torch.randint(0, 11, (4, 7), generator=torch.Generator().manual_seed(step))
        engine.set_lr(0.01 / (step + 1))
        loss = engine.forward(ids[:, :-1], ids[:, 1:])
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def full_state(step: int = 4) -> TrainingState:
    memory = tuple(torch.randn(4, 3, 8).bfloat16() for _ in range(2))
    tables = [{"order": torch.randint(0, 99, (7, 3)), "logit": torch.randn(7, 3)} for _ in range(2)]
    return TrainingState(
        step=step,
        cursor=step + 100,
        rng=torch.get_rng_state(),
        memory=memory,
        stream_B=torch.tensor([6, 4, 7, 5]),
        tables=tables,
    )


def save(folder: Path, engine: Engine, step: int, keep: int = 2) -> Path:
    state = TrainingState(step=step, cursor=step, rng=torch.get_rng_state())
    return checkpoint.save(folder, engine, state, facts={"config": to_plain(config())}, keep=keep)


def everything(engine: Engine) -> dict[str, Tensor]:
    parameters = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters([p for p in parameters.values() if hasattr(p, "ds_id")]):
        result = {f"compute/{n}": p.detach().clone() for n, p in parameters.items()}
    for name, state in engine.read_state():
        result.update((f"{key}/{name}", value.clone()) for key, value in state.items())
    return result


def differ(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [key for key in a if not torch.equal(a[key], b[key])]


def resume(
    path: Path, setup: Config, meddle: Callable[[Engine], None] | None = None
) -> tuple[list[float], dict[str, Tensor]]:
    """A fresh model of another seed, restored, trained from step 4 to 8."""
    engine = start(Tiny(seed=9), setup)
    state = checkpoint.load(path, engine)
    if meddle:
        meddle(engine)
    torch.set_rng_state(state.rng)
    losses = train(engine, state.step, 8)
    return losses, everything(engine)


@pytest.fixture(scope="module")
def uninterrupted() -> Callable[[Path, Config], tuple[Path, list[float], dict[str, Tensor]]]:
    """Train 4 steps, save, train on to step 8 in the same process."""

    def run(folder: Path, setup: Config) -> tuple[Path, list[float], dict[str, Tensor]]:
        engine = start(Tiny(), setup)
        torch.manual_seed(77)
        train(engine, 0, 4)
        path = save(folder, engine, 4)
        return path, train(engine, 4, 8), everything(engine)

    return run


@pytest.mark.parametrize(
    "stage,precision",
    [
        (0, Precision.fp32),
        (1, Precision.fp32),
        (3, Precision.fp32),
        (1, Precision.bf16),
        (2, Precision.bf16),
        (3, Precision.bf16),
    ],
)
def test_resume_equals_never_having_stopped(
    stage: int, precision: Precision, tmp_path: Path, uninterrupted: Any
) -> None:
    setup = config(stage, precision)
    path, losses, wanted = uninterrupted(tmp_path, setup)
    got_losses, got = resume(path, setup)
    assert got_losses == losses
    assert differ(got, wanted) == []


def test_every_part_matters(tmp_path: Path, uninterrupted: Any) -> None:
    """Negative controls: leave one thing unrestored and the result differs."""
    path, losses, _ = uninterrupted(tmp_path, config())

    def zero(kind: str) -> Callable[[Engine], None]:
        def act(engine: Engine) -> None:
            for name, state in list(engine.read_state()):
                engine.write_state(name, {**state, kind: torch.zeros_like(state[kind])})

        return act

    for meddle in (zero("exp_avg"), zero("exp_avg_sq"), lambda engine: engine.set_adam_step(0)):
        assert resume(path, config(), meddle)[0] != losses
    assert resume(path, config(), lambda engine: None)[0] == losses
    engine = start(Tiny(seed=9), config())
    checkpoint.load(path, engine)
    torch.manual_seed(1)  # RNG not restored: other dropout
    assert train(engine, 4, 8) != losses


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_saved_at_zero_1_goes_on_at_another_stage(stage: int, tmp_path: Path, uninterrupted: Any) -> None:
    path, losses, wanted = uninterrupted(tmp_path, config(1))
    same = start(Tiny(seed=9), config(stage))
    checkpoint.load(path, same)
    source = start(Tiny(seed=9), config(1))
    checkpoint.load(path, source)
    assert differ(everything(same), everything(source)) == []
    if stage:  # stage 0 cannot clip
        got_losses, got = resume(path, config(stage))
        assert got_losses == pytest.approx(losses, rel=1e-5)
        for key, value in got.items():
            assert torch.allclose(value, wanted[key], rtol=1e-4, atol=1e-6), key


def test_keys_and_values(tmp_path: Path) -> None:
    engine = start(Tiny(), config())
    train(engine, 0, 3)
    state = full_state()
    path = checkpoint.save(tmp_path / "checkpoints", engine, state, facts={"config": to_plain(config())}, keep=1)
    assert path == tmp_path / "checkpoints" / "step-00000004"
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "shard-00000.safetensors"]
    live = dict(engine.read_state())
    with safe_open(path / files.shard_name(0), "pt") as shard:
        keys = set(shard.keys())
        for name, values in live.items():
            for kind, value in values.items():
                if ".experts." in name:
                    assert f"{kind}/{name}" not in keys
                    for e in range(3):
                        assert torch.equal(shard.get_tensor(f"{kind}/{name}/{e:05d}"), value[e])
                    assert f"{kind}/{name}/00003" not in keys
                else:
                    assert torch.equal(shard.get_tensor(f"{kind}/{name}"), value)
        assert {k for k in keys if k.startswith("buffer/")} == {"buffer/gate_weight"}
        assert state.memory is not None
        assert torch.equal(shard.get_tensor("memory/1/000004"), state.memory[1][1])
        assert torch.equal(shard.get_tensor("table/1/order"), state.tables[1]["order"])
        assert shard.get_tensor("rng/torch/rank-00000").dtype == torch.uint8
    manifest = checkpoint.read_manifest(path)
    assert keys == set(manifest["tensors"])
    assert manifest["tensors"]["weight/blocks.0.moe.experts.w1/00002"] == {
        "file": files.shard_name(0),
        "dtype": "torch.float32",
        "shape": [5, 8],
    }
    assert (manifest["step"], manifest["adam_step"], manifest["cursor"]) == (4, 3, 104)
    assert manifest["config"]["optim"]["lr"] == 0.01


def test_the_rest_of_the_state_comes_back(tmp_path: Path) -> None:
    engine = start(Tiny(), config())
    state = full_state()
    path = checkpoint.save(tmp_path, engine, state, facts={}, keep=1)
    got = checkpoint.load(path, engine)
    assert (got.step, got.cursor) == (4, 104)
    assert torch.equal(got.rng, state.rng) and got.device_rng is None
    assert got.memory is not None and state.memory is not None and got.stream_B is not None
    assert got.stream_B.tolist() == [4, 5, 6, 7]
    for a, b in zip(got.memory, state.memory, strict=True):
        assert a.dtype == torch.bfloat16 and torch.equal(a, b[[1, 3, 0, 2]])
    for table, wanted in zip(got.tables, state.tables, strict=True):
        assert differ(table, wanted) == []
    empty = TrainingState(step=5, cursor=1, rng=state.rng, memory=(torch.zeros(1, 0, 8),) * 2)
    empty.stream_B = torch.tensor([0])
    path = checkpoint.save(tmp_path, engine, empty, facts={}, keep=1)
    memory = checkpoint.load(path, engine).memory
    assert memory is not None and [tuple(m.shape) for m in memory] == [(1, 0, 8)] * 2
    assert checkpoint.load(save(tmp_path, engine, 6), engine).memory is None


def test_the_random_state_of_a_gpu_comes_back(tmp_path: Path) -> None:
    engine, state = start(Tiny(), config()), full_state()
    state.device_rng = torch.arange(16, dtype=torch.uint8)
    got = checkpoint.load(checkpoint.save(tmp_path, engine, state, facts={}, keep=1), engine)
    assert got.device_rng is not None and torch.equal(got.device_rng, state.device_rng)


class OnDevice:
    """A tensor of a GPU as a checkpoint sees one: counts those that are still held."""

    held = 0
    is_cuda = True

    def __init__(self, value: Tensor) -> None:
        self.value, self.shape = value, value.shape
        OnDevice.held += 1

    def __del__(self) -> None:
        OnDevice.held -= 1

    def __getitem__(self, row: int) -> "OnDevice":
        return OnDevice(self.value[row])

    def cpu(self) -> Tensor:
        return self.value.clone()


def test_a_gpu_holds_one_parameter_more_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO gathers each weight and moment on the GPU: those of one parameter, never of the whole model."""
    engine, most = start(Tiny(), config()), 0
    whole = list(engine.read_state())

    def read_state() -> Any:
        nonlocal most
        for name, values in whole:
            most = max(most, OnDevice.held)
            yield name, {kind: OnDevice(value) for kind, value in values.items()}

    monkeypatch.setattr(engine, "read_state", read_state)
    written = checkpoint._tensors(engine, TrainingState(step=1, cursor=1, rng=torch.get_rng_state()))
    assert 0 < most <= 4  # three of the parameter before and one slice, until the next is read
    for name, values in whole:
        for kind, value in values.items():
            stored = [written[key] for key in parameter_keys(kind, name, range(3) if ".experts." in name else None)]
            assert torch.equal(torch.stack(stored) if ".experts." in name else stored[0], value)


def test_weights_for_evaluation(tmp_path: Path) -> None:
    engine = start(Tiny(), config(precision=Precision.bf16))
    train(engine, 0, 3)
    path = checkpoint.save(tmp_path, engine, full_state(), facts={}, keep=1)
    module = Tiny(seed=9)
    assert len(checkpoint.load_weights(path, module).tables) == 2
    for name, state in engine.read_state():
        assert torch.equal(module.get_parameter(name), state["weight"])  # the fp32 master
    assert torch.equal(module.get_buffer("gate_weight"), engine.module.get_buffer("gate_weight"))


def test_another_model_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, start(Tiny(), config()), 4)
    with pytest.raises(UserError, match=r"w1/00003 has shape none in the checkpoint, \[5, 8\] here"):
        checkpoint.load(path, start(Tiny(experts=4), config()))
    with pytest.raises(UserError, match=r"w1/00002 has shape \[5, 8\] in the checkpoint, none here"):
        checkpoint.load_weights(path, Tiny(experts=2))
    other = Tiny()
    other.out = nn.Linear(8, 12)
    with pytest.raises(UserError, match=r"weight/out.weight has shape \[11, 8\].*\[12, 8\] here"):
        checkpoint.load_weights(path, other)
    del other.gate_weight
    with pytest.raises(UserError, match=r"step-00000004 does not fit"):
        checkpoint.load_weights(path, other)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 10)


def flip(file: Path) -> None:
    """Change one bit."""
    data = bytearray(file.read_bytes())
    data[-200] ^= 1
    file.write_bytes(data)


def put(file: Path, data: bytes) -> None:
    file.write_bytes(data)


DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    ("shard-00000.safetensors", cut, "bytes instead of"),
    ("shard-00000.safetensors", flip, "sha256"),
    ("shard-00000.safetensors", Path.unlink, "missing"),
    ("manifest.json", Path.unlink, "No such file"),
    ("manifest.json", cut, "not a manifest"),
    ("manifest.json", flip, "manifest|checksum"),
    ("manifest.json", lambda file: put(file, b"[1]"), "not a manifest"),
    ("manifest.json", lambda file: put(file, b"\xff\xfe{}"), "not a manifest"),
]


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    engine = start(Tiny(), config())
    for step in (4, 8):
        save(folder, engine, step)
    return folder


@pytest.mark.parametrize("name,damage,why", DAMAGE)
def test_damage_is_found_and_the_one_before_is_used(
    name: str, damage: Callable[[Path], None], why: str, two_checkpoints: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, folder)
    assert checkpoint.find_newest(folder) == (folder / "step-00000008", [])
    damage(folder / "step-00000008" / name)
    path, (warning,) = checkpoint.find_newest(folder)
    assert path == folder / "step-00000004"
    assert f"step-00000008/{name}: " in warning and "\n" not in warning
    with pytest.raises(UserError, match=why):
        checkpoint.load_weights(folder / "step-00000008", Tiny())
    damage(folder / "step-00000004" / name)
    path, warnings = checkpoint.find_newest(folder)
    assert path is None and len(warnings) == 2


def test_a_changed_number_in_the_manifest_is_found(two_checkpoints: Path, tmp_path: Path) -> None:
    path = tmp_path / "step-00000008"
    shutil.copytree(two_checkpoints / "step-00000008", path)
    file = path / "manifest.json"
    file.write_text(file.read_text().replace('"cursor": 8', '"cursor": 9'))
    with pytest.raises(UserError, match="checksum does not match"):
        checkpoint.read_manifest(path)
    manifest = json.loads((two_checkpoints / "step-00000008" / "manifest.json").read_text())
    del manifest["checksum"]
    manifest["format"] = 2
    file.write_text(json.dumps({**manifest, "checksum": checksum(manifest)}))
    with pytest.raises(UserError, match="format version 2, this program reads 1"):
        checkpoint.read_manifest(path)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert checkpoint.find_newest(tmp_path / "none") == (None, [])


def test_the_newest_are_kept(tmp_path: Path) -> None:
    engine = start(Tiny(), config())
    for step in (4, 8, 12, 100_000_000):
        save(tmp_path, engine, step, keep=2)
    names = ["step-00000012", "step-100000000"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    flip(tmp_path / "step-100000000" / files.shard_name(0))
    save(tmp_path, engine, 14, keep=1)  # resumed from 12: the damaged one does not count
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000014", "step-100000000"]
    save(tmp_path, engine, 100_000_000, keep=1)  # and is replaced in the end
    assert checkpoint.find_newest(tmp_path) == (tmp_path / "step-100000000", [])
    assert len(list(tmp_path.iterdir())) == 1


def test_leftovers_of_dead_writers_are_removed(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = socket.gethostname()
    dead = tmp_path / f".writing-4-{gone.pid}@{host}"
    mine = tmp_path / f".writing-4-{os.getpid()}@{host}"
    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    alive = tmp_path / f".writing-4-{living.pid}@{host}"
    elsewhere, ancient = tmp_path / ".writing-4-1@no-host", tmp_path / ".writing-5-1@no-host"
    for path in (dead, mine, alive, elsewhere, ancient):
        (path / "new").mkdir(parents=True)
    os.utime(ancient, (0, 0))
    assert checkpoint.find_newest(tmp_path) == (None, [])
    save(tmp_path, start(Tiny(), config()), 8)
    left = sorted(p.name for p in tmp_path.iterdir())
    living.communicate(b"\n")
    assert left == sorted([alive.name, elsewhere.name, "step-00000008"])


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the write really fails half-way."""
    engine = start(Tiny(), config())
    save(tmp_path, engine, 4, keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
    try:
        with pytest.raises(OSError, match="step-00000008 could not be written"):
            save(tmp_path, engine, 8, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]
    assert checkpoint.find_newest(tmp_path) == (tmp_path / "step-00000004", [])


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from foreroute.engine.checkpoint import save_load as checkpoint
from foreroute.engine.checkpoint import files as files
from foreroute.engine.parallel.mesh import Mesh

class Stub:
    mesh = Mesh()
    module = torch.nn.Linear(2, 2)
    def adam_step(self): return 8
    def read_state(self):
        for name, p in self.module.named_parameters():
            yield name, {kind: p.detach().clone() for kind in checkpoint.STATE_KEYS}

assert "deepspeed" not in sys.modules  # evaluation must do without
files.sync = lambda path: path.name == files.MANIFEST and os.kill(os.getpid(), signal.SIGKILL)
state = checkpoint.TrainingState(step=8, cursor=8, rng=torch.get_rng_state())
checkpoint.save(Path(sys.argv[1]), Stub(), state, facts={}, keep=1)
"""


def test_a_writer_that_is_killed(tmp_path: Path) -> None:
    engine = start(Tiny(), config())
    save(tmp_path, engine, 4)
    env = {**os.environ, "PYTHONPATH": "."}
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=env).returncode == -9
    assert len(list(tmp_path.glob(".writing-8-*/new/*"))) == 2  # it died with both files written
    assert checkpoint.find_newest(tmp_path) == (tmp_path / "step-00000004", [])
    save(tmp_path, engine, 8)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000004", "step-00000008"]


def test_saving_changes_nothing(tmp_path: Path) -> None:
    engine = start(Tiny(), config())
    train(engine, 0, 2)
    before, rng = copy.deepcopy(everything(engine)), torch.get_rng_state()
    save(tmp_path, engine, 2)
    assert differ(everything(engine), before) == []
    assert torch.equal(torch.get_rng_state(), rng)
