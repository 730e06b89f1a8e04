"""Runs training with DeepSpeed: takes our Config and returns a small Engine. Only this folder imports DeepSpeed.

DeepSpeed runs every training step, also on one process. This file builds its config from ours. `Engine` has the methods
of a step (forward, backward, step). For engine/checkpoint/save_load.py it also reads and writes the fp32 master weight
and the Adam moments of each parameter by name, at every ZeRO stage. DeepSpeed's own checkpoints, schedulers and loggers
are not used.
"""

import contextlib
import io
import math
import os
import warnings
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import deepspeed
import deepspeed.ops
import torch
from torch import Tensor, nn
from torch import distributed as dist

from foreroute.engine.config import Config, NgramTablesConfig, OptimConfig, Precision, TrainConfig
from foreroute.engine.errors import require
from foreroute.engine.moe.exchange import build_exchange
from foreroute.engine.moe.layer import MoELayer
from foreroute.engine.ngram_tables.row_rules import RowAdam
from foreroute.engine.ngram_tables.tables import NgramTables
from foreroute.engine.optim.adam import build_optimizer
from foreroute.engine.optim.deepspeed_contract import (
    COMPATIBLE_OPS,
    NEW_GROUP_NAME,
    OVERFLOW_NAME,
    SHARED_MEMORY_OP,
    TorchBackend,
)
from foreroute.engine.optim.expert_sharding import (
    aligned_first,
    balance_over_ranks,
    expert_group_comm,
    is_sharded,
    parameter_groups,
    shard_experts,
    total_grad_norm,
)
from foreroute.engine.optim.grad_norm import clip_factor, joint_norm, norm_checked_by
from foreroute.engine.optim.model_state import ModelState
from foreroute.engine.optim.zero_defaults import KEPT_WHOLE, MAX_BUCKET
from foreroute.engine.parallel.collectives import ExpertGroupComm
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.parallel.watchdog import FOR_EVER

# DeepSpeed calls collectives by names that PyTorch has deprecated.
warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+` is deprecated", FutureWarning)

MOMENTS = ("exp_avg", "exp_avg_sq")


class Beside(Protocol):
    """Parameters in training beside the module's: ZeRO does not see them, and they are updated after its step."""

    def return_gradients(self) -> None:
        """Send the gradients to the ranks that hold the parameters, after the last backward pass of a step."""

    def grad_norm(self) -> Tensor:
        """Compute the norm of their gradients, a scalar on the device, equal on all ranks; a collective."""

    def update(self, *, lr: float, scale: Tensor, keep: Tensor) -> None:
        """Update them by their gradients times `scale`, and begin the next step.

        Args:
            lr: learning rate of the step.
            scale: scalar on the device, by which clipping shortens all gradients of the step.
            keep: bool scalar on the device; where it is false nothing may change.
        """


class Engine(ModelState):
    """A model in training: the part of a DeepSpeed engine that foreroute uses."""

    def __init__(self, engine: Any, accumulation: int, mesh: Mesh, comm: ExpertGroupComm | None) -> None:
        """Set a DeepSpeed engine, and the communicator of the expert group; None if experts are not sharded."""
        stage = int(engine.zero_optimization_stage())
        self._adam = engine.optimizer.optimizer if stage else engine.optimizer
        super().__init__(engine.module, self._adam, mesh, zero=engine.optimizer if stage else None, stage=stage)
        self.comm = comm
        self.beside: Sequence[Beside] = [module for module in self.module.modules() if isinstance(module, NgramTables)]
        """Further parameters; the norm, its check, clipping and the update of a step include them."""
        self._engine = engine
        self._accumulation = accumulation
        self._micro_batches = 0  # since the last optimizer step
        self._grad_norm = torch.tensor(float("nan"))
        self._unless: Tensor | None = None
        if self._stage in (1, 2):
            setattr(engine.optimizer, OVERFLOW_NAME, lambda **_: None)
        # As Adam's first step would, so that its state can be read and written at any time.
        self.create(dict.fromkeys(self.parts(), MOMENTS), {name: {"step": 0.0} for name in self.parts()})

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return torch.device(self._engine.device)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model for training."""
        self._leave_inference()
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch's mean loss, divided by the number of micro-batches."""
        if self._micro_batches == self._accumulation:
            raise RuntimeError(f"step() is due after {self._accumulation} micro-batches")
        self._engine.backward(loss)
        self._micro_batches += 1
        if self._micro_batches < self._accumulation:
            self._engine.step()  # before the last micro-batch this only counts
            return
        for part in self.beside:
            part.return_gradients()

    def step(self, *, unless: Tensor | None = None) -> Tensor:
        """Clip the gradients and update the weights, after the last micro-batch of an accumulation.

        An update is skipped if its gradient norm is not finite: weights and Adam's state do not change. Adam's kernel
        decides this on the device (torch's found_inf); the host reads nothing back.

        Args:
            unless: bool scalar on the device; True also skips the update.

        Returns:
            Bool scalar on the device: whether the weights were updated.
        """
        if self._micro_batches != self._accumulation:
            raise RuntimeError(f"step() after {self._micro_batches} of {self._accumulation} micro-batches")
        self._micro_batches, self._unless = 0, unless
        self._adam.found_inf = None
        others = [part.grad_norm() for part in self.beside]
        if self._stage == 0:  # without clipping DeepSpeed computes no norm
            self._drop_unless_finite(joint_norm(total_grad_norm(self.module.parameters(), self.comm), others))
        with norm_checked_by(self._drop_unless_finite, others):
            self._engine.step()
        if self._adam.found_inf is None:
            raise RuntimeError("DeepSpeed has not checked whether the gradient norm is finite")
        updated: Tensor = self._adam.found_inf == 0
        for part in self.beside:
            part.update(
                lr=self._adam.param_groups[0]["lr"],
                scale=clip_factor(self._grad_norm, self._engine.gradient_clipping()),
                keep=updated,
            )
        return updated

    @property
    def grad_norm(self) -> Tensor:
        """The global gradient norm of the last step before clipping, a scalar on the device; inf or nan if the gradient
        was not finite."""
        return self._grad_norm

    def _drop_unless_finite(self, norm: Tensor | float) -> bool:
        """Make Adam skip the update if the norm is not finite (DeepSpeed may report -1); return False to DeepSpeed."""
        norm = torch.as_tensor(norm)
        self._grad_norm = norm.masked_fill(norm < 0, math.inf)
        dropped = ~self._grad_norm.isfinite()
        if self._unless is not None:
            dropped = dropped | self._unless.to(dropped.device)
        adam_device = next(self.flats()).device  # with train.offload, the host
        self._adam.found_inf = dropped.to(adam_device, torch.float32)
        return False

    def set_lr(self, lr: float) -> None:
        """Set the learning rate for the next steps."""
        for group in self._adam.param_groups:
            group["lr"] = lr

    def adam_step(self) -> int:
        """Return the number of updates that Adam has made, which its bias correction uses."""
        steps = {int(self._adam.state[flat]["step"]) for flat in self.flats()}
        if len(steps) != 1:
            raise RuntimeError(f"parameter groups differ in their Adam step: {sorted(steps)}")
        return steps.pop()

    def set_adam_step(self, step: int) -> None:
        """Set the number of updates that Adam has made."""
        for flat in self.flats():
            self._adam.state[flat]["step"].fill_(step)

    def num_parameters(self) -> int:
        """Return the number of parameters of the whole model, including the experts of other ranks."""
        total = 0
        for name, shape in self.shapes().items():
            shared_out = is_sharded(self.module.get_parameter(name))
            total += math.prod(shape) * (self.mesh.ep_size if shared_out else 1)
        return total


def start(model: nn.Module, config: Config, mesh: Mesh | None = None) -> Engine:
    """Initialize DeepSpeed with the model and return the engine that trains it.

    The model, built with all experts, is changed in place: it keeps the experts of this rank, and with bf16 its
    parameters become the compute copy (buffers keep their dtype). Starts a process group if there is none, for one
    process only.

    Raises:
        UserError: DeepSpeed handles an option wrongly, the experts cannot be sharded evenly, or DeepSpeed lacks a name
            that is needed.
        RuntimeError: DeepSpeed's groups differ from those of the mesh.
    """
    mesh = mesh or Mesh()
    shared = [m for m in model.modules() if isinstance(m, MoELayer)] if mesh.ep_size > 1 else []
    for layer in shared:
        shard_experts(layer, mesh)
    ds_config = _deepspeed_config(
        config.train,
        config.optim.clip,
        streams=config.streams_per_micro_batch(mesh.world),
        num_params=sum(p.numel() for p in model.parameters()),
    )
    _start_process_group(mesh.world)
    ordered = aligned_first(model.parameters())
    parameters: Any = parameter_groups(ordered) if shared else ordered
    optimizer = build_optimizer(parameters, config.optim)
    wait_at_most(FOR_EVER)  # the watchdog ends them
    with contextlib.redirect_stdout(io.StringIO()):  # hides the memory use that bf16 prints, not warnings
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    comm = expert_group_comm(mesh, torch.device(engine.device)) if shared else None
    for layer in shared:
        assert comm is not None
        layer.connect(build_exchange(comm, config.parallel, config.kernels.backend))
    balance_over_ranks(model, config.moe, mesh)
    _hold_tables(model, config.ngram_tables, config.optim, mesh, torch.device(engine.device))
    return Engine(engine, config.train.accumulation, mesh, comm)


def _hold_tables(
    model: nn.Module, config: NgramTablesConfig, optim: OptimConfig, mesh: Mesh, device: torch.device
) -> None:
    """Make this rank's rows of the model's n-gram tables, whose collectives have a process group of their own."""
    rule = RowAdam(optim.beta1, optim.beta2, optim.eps, config.updates, config.moments)
    for tables in (module for module in model.modules() if isinstance(module, NgramTables)):
        comm = None
        if mesh.world > 1:
            comm = ExpertGroupComm(dist.new_group(timeout=FOR_EVER), device=device)
        tables.hold(mesh, rule, comm, device=device)


def _deepspeed_config(train: TrainConfig, clip: float, *, streams: int, num_params: int) -> dict[str, Any]:
    """Translate our configuration; refuse options that are wrong upstream (DeepSpeed issues 8475 and 8613).

    Args:
        clip: largest gradient norm; 0 for none.
        streams: number of streams of this rank in a micro-batch.
    """
    bf16 = train.precision is Precision.bf16
    if train.zero_stage == 0:
        require(
            clip == 0,
            f"optim.clip={clip}: DeepSpeed clips wrongly at train.zero_stage=0; use train.zero_stage=1 or optim.clip=0",
        )
        require(not bf16, "train.precision=bf16: needs train.zero_stage=1, 2 or 3, which keep the fp32 weights")
    zero: dict[str, Any] = {
        "stage": train.zero_stage,
        "reduce_bucket_size": min(num_params, MAX_BUCKET),  # allocated at every backward pass
        "round_robin_gradients": False,  # True makes all reads and writes of state by parameter wrong
    }
    if train.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = KEPT_WHOLE
    if train.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": streams,
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": clip,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": (
            False
        ),  # PyTorch's Adam also for offloaded state: DeepSpeed's own would be compiled
        "steps_per_print": 2**62,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},  # waits for the device before and after each step
    }
    if bf16:
        result["bf16"] = {"enabled": True, "check_grad_overflow": True}
        result["data_types"] = {"grad_accum_dtype": "fp32"}
        # The default, bf16, rounds the accumulated gradient, on one rank too.
        result["communication_data_type"] = "fp32"
    return result


def wait_at_most(timeout: timedelta) -> None:
    """Set the timeout of collectives in the groups that DeepSpeed creates, instead of PyTorch's 30 minutes."""
    setattr(TorchBackend, NEW_GROUP_NAME, lambda _, ranks: dist.new_group(ranks, timeout))


def skip_shared_memory_op() -> None:
    """Prevent DeepSpeed from compiling an op for inference at its first start on a CPU, which takes a minute."""
    getattr(deepspeed.ops, COMPATIBLE_OPS)[SHARED_MEMORY_OP] = False


def _start_process_group(world: int) -> None:
    """Start a process group of this process alone, in memory: no port, no address, no MPI."""
    skip_shared_memory_op()
    if world == 1:
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed requires it
    if dist.is_initialized():
        return
    if world != 1:
        raise RuntimeError(f"world={world}: start the process group before the engine")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
