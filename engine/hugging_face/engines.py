"""DeepSpeed engines around models with expert layers: checkpoints, and gradient clipping at ZeRO-0.

DeepSpeed 0.19.8 cannot save layers with sharded experts, and at ZeRO-0 it clips by a norm that differs between ranks
(DeepSpeed issue 8475). Trainer and Accelerate call the engine for both, so `adapt_engine` replaces its methods.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from foreroute.engine.errors import UserError, require
from foreroute.engine.hugging_face.rank_state import plain_part, read_rank_state, write_rank_state
from foreroute.engine.optim.expert_sharding import is_sharded, total_grad_norm
from foreroute.engine.plug_in.planned_experts import PlannedExperts
from foreroute.engine.sealed_files import replacing

_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
_LATEST = "latest"  # as DeepSpeed names the file with the newest tag


def has_sharded_experts(experts: PlannedExperts) -> bool:
    """Return whether each rank of an expert group holds experts of its own."""
    return any(is_sharded(p) for layer in experts.layers for p in layer.experts.parameters())


def is_engine(value: Any) -> bool:
    """Return whether a value is a DeepSpeed engine."""
    return hasattr(value, "zero_optimization_stage") and isinstance(getattr(value, "module", None), nn.Module)


def adapt_engine(engine: Any, experts: PlannedExperts) -> None:
    """Make save_checkpoint, load_checkpoint and gradient clipping of a DeepSpeed engine right for its expert layers.

    With sharded experts save_checkpoint writes a file for each rank. load_checkpoint needs the same number of ranks,
    size of expert groups and ZeRO stage, and training resumes bit for bit. Without sharded experts DeepSpeed's own
    checkpoints are kept, and the state of the experts lies beside them.

    Raises:
        UserError: the engine has 16-bit weights without fp32 ones (ZeRO-0), with sharded experts.
    """
    checkpoint = _Checkpoint(engine, experts)
    sharded = has_sharded_experts(experts)
    if sharded and engine.zero_optimization_stage() == 0:
        require(
            not (engine.bfloat16_enabled() or engine.fp16_enabled()),
            "bf16 or fp16 with sharded experts: needs zero_optimization.stage 1, 2 or 3, which keep the fp32 weights",
        )
        engine.clip_fp32_gradients = functools.partial(_clip, engine, experts)
    if sharded:
        engine.save_checkpoint, engine.load_checkpoint = checkpoint.save, checkpoint.load
    else:
        engine.save_checkpoint = functools.partial(checkpoint.save_beside, engine.save_checkpoint)
        engine.load_checkpoint = functools.partial(checkpoint.load_beside, engine.load_checkpoint)


def _clip(engine: Any, experts: PlannedExperts) -> None:
    """Clip the gradients to the engine's largest norm, with the norm of the whole model."""
    parameters = list(engine.module.parameters())
    norm = total_grad_norm(parameters, experts.comm)
    nn.utils.clip_grads_with_norm_(parameters, engine.gradient_clipping(), norm)
    engine._global_grad_norm = norm


class _Checkpoint:
    """The methods that replace those of an engine; arguments as of DeepSpeed's."""

    def __init__(self, engine: Any, experts: PlannedExperts) -> None:
        self._engine, self._experts = engine, experts

    def save(self, save_dir: Any, tag: Any = None, client_state: Any = None, **_: Any) -> bool:
        """Write this rank's file; every rank calls it."""
        engine, folder = self._engine, self._folder(save_dir, tag)
        optimizer = engine.optimizer.state_dict()
        scaler = getattr(engine.optimizer, "loss_scaler", None)
        state = {
            "stage": engine.zero_optimization_stage(),
            "experts": self._experts.state_dict(),
            "optimizer": plain_part(optimizer),
            "scaler": plain_part(vars(scaler)) if scaler is not None else {},
            "counters": {name: getattr(engine, name) for name in _COUNTERS},
            "scheduler": engine.lr_scheduler.state_dict() if engine.lr_scheduler is not None else None,
            "client": client_state or {},
        }
        if state["stage"] < 3:
            state["module"] = engine.module.state_dict()
        write_rank_state(folder, state, engine.global_rank, engine.world_size)
        with replacing(Path(save_dir) / _LATEST) as file:  # the same on every rank
            file.write_text(folder.name)
        return True

    def load(
        self,
        load_dir: Any,
        tag: Any = None,
        *_: Any,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        **__: Any,
    ) -> tuple[str, Any]:
        """Restore this rank's file; every rank calls it.

        Raises:
            UserError: it is missing, damaged, or of other ranks or another ZeRO stage.
        """
        require(load_optimizer_states, "load_optimizer_states=False: must be True with sharded experts")
        engine, folder = self._engine, self._folder(load_dir, tag or _latest(Path(load_dir)))
        state = read_rank_state(folder, engine.global_rank, engine.world_size)
        stage = engine.zero_optimization_stage()
        require(state["stage"] == stage, f"{folder}: saved at ZeRO stage {state['stage']}, must be {stage} as here")
        self._experts.load_state_dict(state["experts"])
        if stage < 3:
            engine.module.load_state_dict(state["module"])
        if stage == 0:
            engine.optimizer.load_state_dict(state["optimizer"])
        else:
            whole = {**engine.optimizer.state_dict(), **state["optimizer"]}
            engine.optimizer.load_state_dict([whole] * engine.world_size, load_from_fp32_weights=True)
            vars(engine.optimizer.loss_scaler).update(state["scaler"])
        for name, value in state["counters"].items():
            setattr(engine, name, value)
        if load_lr_scheduler_states and engine.lr_scheduler is not None:
            engine.lr_scheduler.load_state_dict(state["scheduler"])
        return str(folder), state["client"]

    def save_beside(
        self, theirs: Callable[..., Any], save_dir: Any, tag: Any = None, *args: Any, **options: Any
    ) -> Any:
        """Save with DeepSpeed's own function, and the experts' state beside."""
        if self._engine.global_rank == 0:
            write_rank_state(self._folder(save_dir, tag), {"experts": self._experts.state_dict()})
        return theirs(save_dir, tag, *args, **options)

    def load_beside(
        self, theirs: Callable[..., Any], load_dir: Any, tag: Any = None, *args: Any, **options: Any
    ) -> Any:
        """Load the experts' state, then all else with DeepSpeed's own function."""
        folder = self._folder(load_dir, tag or _latest(Path(load_dir)))
        self._experts.load_state_dict(read_rank_state(folder)["experts"])
        return theirs(load_dir, tag, *args, **options)

    def _folder(self, save_dir: Any, tag: Any) -> Path:
        return Path(save_dir) / (str(tag) if tag is not None else f"global_step{self._engine.global_steps}")


def _latest(folder: Path) -> str:
    file = folder / _LATEST
    if not file.is_file():
        raise UserError(f"{file}: missing, so {folder} holds no checkpoint")
    return file.read_text().strip()
