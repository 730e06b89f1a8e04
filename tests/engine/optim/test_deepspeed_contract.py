"""What foreroute relies on in DeepSpeed: a tested version, undocumented names, groups of ranks, a start without a
compiler."""

import gc
import itertools
import math
import subprocess
import sys
from datetime import timedelta
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.comm.torch import TorchBackend
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups
from torch import distributed as dist
from torch import nn

from foreroute.engine.config import Precision
from foreroute.engine.errors import UserError
from foreroute.engine.model.build import build_model
from foreroute.engine.optim import deepspeed_contract as contract
from foreroute.engine.optim import deepspeed_engine as adapter
from foreroute.engine.optim import expert_sharding, grad_norm
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.parallel.watchdog import FOR_EVER
from foreroute.engine.testing.tiny_run import SYMBOLS, tiny_config


@pytest.fixture(autouse=True)
def side_effects(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in test_deepspeed_adapter.py."""
    gc.freeze()
    monkeypatch.setattr(nn.functional, "linear", nn.functional.linear)


def test_contract_with_this_deepspeed_version() -> None:
    assert contract.SHARED_MEMORY_OP in getattr(deepspeed.ops, contract.COMPATIBLE_OPS)
    for name in contract.GROUP_NAMES:
        assert callable(getattr(groups, name))
    for module in contract.NORM_CHECKERS:
        assert callable(getattr(module, contract.NORM_CHECK_NAME))
    assert callable(getattr(contract.stage_1_and_2, contract.NORM_MASK_NAME))
    for stage, precision, offload in itertools.product((1, 2, 3), Precision, (False, True)):
        setup = tiny_config(stage, precision=precision, offload=offload)
        engine = adapter.start(build_model(setup, SYMBOLS), setup)
        kind: Any = DeepSpeedZeroOptimizer_Stage3 if stage == 3 else DeepSpeedZeroOptimizer
        if (stage, precision, offload) == (1, Precision.bf16, False):
            kind = BF16_Optimizer
        assert type(engine._engine.optimizer) is kind
        assert isinstance(engine._adam, torch.optim.Adam) and engine._adam.defaults["fused"]  # knows found_inf
        if stage < 3:
            assert callable(getattr(kind, contract.OVERFLOW_NAME, None)) == (kind is DeepSpeedZeroOptimizer)
        names = (contract.FLATS_NAME, *contract.REGATHER_NAMES) if stage == 3 else contract.LINK_NAMES
        for name in names:
            assert hasattr(engine._engine.optimizer, name)
        for param in engine.module.parameters():
            if stage == 3:
                assert all(hasattr(param, name) for name in contract.SHARD_NAMES)
            else:
                fragment: Any = getattr(param, "_hp_mapping", None)
                assert fragment.get_hp_fragment("exp_avg") is not None


@pytest.mark.parametrize(
    ("stage", "kind", "name"),
    [
        *((2, DeepSpeedZeroOptimizer, name) for name in contract.LINK_NAMES),
        *((3, DeepSpeedZeroOptimizer_Stage3, name) for name in (contract.FLATS_NAME, *contract.REGATHER_NAMES)),
    ],
)
def test_an_engine_without_a_name_is_refused(
    stage: int, kind: type, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a version would be that renamed it."""

    def renamed(self: Any, wanted: str) -> Any:
        if wanted == name:
            raise AttributeError(name)
        return object.__getattribute__(self, wanted)

    setup = tiny_config(stage)
    engine = adapter.start(build_model(setup, SYMBOLS), setup)
    monkeypatch.setattr(kind, "__getattribute__", renamed)
    with pytest.raises(
        UserError, match=rf"DeepSpeed {deepspeed.__version__} is installed.*: {kind.__name__} has no {name} "
    ):
        adapter.Engine(engine._engine, 1, Mesh(), None)


def test_a_parameter_without_a_name_is_refused() -> None:
    setup = tiny_config(3)
    engine = adapter.start(build_model(setup, SYMBOLS), setup)
    contract.require_names(parameter := next(engine.module.parameters()), *contract.SHARD_NAMES)
    del parameter.ds_tensor  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"Parameter has no ds_tensor "):
        adapter.Engine(engine._engine, 1, Mesh(), None)


LACKING = """
import sys
class Lacking:
    def find_spec(self, name, path=None, target=None):
        if name == "deepspeed.module_inject.auto_ep_layer": raise ModuleNotFoundError(f"No module named '{name}'")
sys.meta_path.insert(0, Lacking())
"""


def test_a_program_without_a_name_ends_with_one_line(tmp_path: Any) -> None:
    (tmp_path / "sitecustomize.py").write_text(LACKING)
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{tmp_path}:.", "DS_ACCELERATOR": "cpu", "HOME": str(tmp_path)}
    start = [sys.executable, "-m", "launch.train", "experiment=debug", f"train.runs_dir={tmp_path}"]
    done = subprocess.run(start, env=env, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"foreroute: DeepSpeed {deepspeed.__version__} is installed, but lacks a name")
    assert "No module named 'deepspeed.module_inject.auto_ep_layer'" in line


def test_how_long_deepspeeds_groups_wait() -> None:
    """In a run for ever, for the watch ends ranks that wait for one that is stuck; beside a loop that nobody watches, a
    while."""

    def seconds(group: dist.ProcessGroup) -> float:
        backend: Any = group._get_backend(torch.device("cpu"))
        return backend.options._timeout.total_seconds()

    assert callable(getattr(TorchBackend, contract.NEW_GROUP_NAME))
    setup = tiny_config()
    adapter.start(build_model(setup, SYMBOLS), setup)
    deepspeeds, plain = deepspeed.comm.new_group([0]), dist.new_group([0])
    assert seconds(deepspeeds) == FOR_EVER.total_seconds()
    assert seconds(plain) == 1800  # negative control: PyTorch's own
    adapter.wait_at_most(timedelta(seconds=77))
    assert seconds(deepspeed.comm.new_group([0])) == 77


@pytest.mark.parametrize("norm", [0.0, 2.5, math.inf, -math.inf, math.nan])
def test_a_norm_is_masked_as_deepspeed_does(norm: float) -> None:
    ours, theirs = torch.tensor(norm), torch.tensor(norm)
    grad_norm.mask_norm(ours)
    getattr(contract.stage_1_and_2, contract.NORM_MASK_NAME)(theirs)
    assert ours.equal(theirs)


def test_an_optimizer_that_asks_about_no_norm_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the question an update that is not finite would be made; afterwards DeepSpeed has its own names again."""
    monkeypatch.setattr(grad_norm, "NORM_CHECKERS", ())
    setup = tiny_config()
    engine = adapter.start(nn.Linear(2, 1), setup)
    theirs = getattr(contract.stage_1_and_2, contract.NORM_CHECK_NAME)
    engine.backward(engine.forward(torch.ones(4, 2)).mean())
    with pytest.raises(RuntimeError, match="has not checked whether the gradient norm is finite"):
        engine.step()
    monkeypatch.undo()
    engine.backward(engine.forward(torch.ones(4, 2)).mean())
    assert engine.step()
    assert getattr(contract.stage_1_and_2, contract.NORM_CHECK_NAME) is theirs


@pytest.mark.parametrize("name", contract.GROUP_NAMES)
def test_other_groups_than_the_meshs_are_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = Mesh(1, 4, 2)
    ranks = {"_get_expert_parallel_group": [0, 1], "_get_expert_data_parallel_group": [1, 3]}
    for other in contract.GROUP_NAMES:
        monkeypatch.setattr(groups, other, lambda group_name, other=other: (group_name, other))
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: ranks[group[1]])
    assert expert_sharding._expert_group(mesh) == ("ep_size_2", "_get_expert_parallel_group")
    right = ranks[name]
    ranks[name] = [0, 3]
    with pytest.raises(RuntimeError) as caught:
        expert_sharding._expert_group(mesh)
    assert f"of rank 1: DeepSpeed has [0, 3], the mesh {right}" in str(caught.value)


def test_experts_that_cannot_be_shared_out() -> None:
    whole = build_model(tiny_config(), SYMBOLS)
    with pytest.raises(UserError, match=r"moe.experts=4: must be a multiple of parallel.expert_ranks=3"):
        adapter.start(whole, tiny_config(), Mesh(0, 3, 3))


START_ALONE = """
import torch
from torch.utils import cpp_extension
from foreroute.engine.optim import deepspeed_engine as adapter
from foreroute.engine.config import Config, OptimConfig, TrainConfig
def no_build(*args, **kwargs): raise SystemExit("an op was compiled")
cpp_extension.load = no_build
engine = adapter.start(
    torch.nn.Linear(2, 1),
    Config(optim=OptimConfig(clip=0), train=TrainConfig(zero_stage=0)),
)
engine.backward(engine.forward(torch.ones(4, 2)).mean())
engine.step()
print("backend", torch.distributed.get_backend(), "world", torch.distributed.get_world_size())
"""


def test_start_alone_is_quiet_and_compiles_nothing(tmp_path: Any) -> None:
    """A fresh process without launcher variables and with an empty cache of compiled ops."""
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ".", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", START_ALONE], env=env, capture_output=True, text=True, timeout=600)
    said = [line for line in done.stderr.splitlines() if "No CUDA runtime is found" not in line]  # PyTorch's, with nvcc
    assert (done.returncode, said) == (0, [])
    assert done.stdout == "backend gloo world 1\n"
    assert not list(tmp_path.rglob("*.so"))
