"""DeepSpeed engines around models with expert layers: checkpoints, and gradient clipping at ZeRO-0.

DeepSpeed 0.19.8 cannot save layers with sharded experts, and at ZeRO-0 it clips by a norm that differs between ranks
(DeepSpeed issue 8475). Trainer and Accelerate call the engine for both, so `adapt_engine` replaces its methods.
"""

import functools
from pathlib import Path
from typing import Any

from torch import nn

from foreroute.engine.errors import require
from foreroute.engine.optim.expert_sharding import total_grad_norm
from foreroute.engine.plug_in import load_pretrained, save_pretrained
from foreroute.engine.plug_in.planned_experts import PlannedExperts
from foreroute.engine.sealed_files import replacing

_LATEST = "latest"  # as DeepSpeed names the file with the newest tag


def is_engine(value: Any) -> bool:
    """Return whether a value is a DeepSpeed engine."""
    return hasattr(value, "zero_optimization_stage") and isinstance(getattr(value, "module", None), nn.Module)


def adapt_engine(engine: Any, experts: PlannedExperts) -> None:
    """Make save_checkpoint, load_checkpoint and gradient clipping of a DeepSpeed engine right for its expert layers.

    A checkpoint is a folder of save_pretrained, with the optimizer, named as DeepSpeed names it. Any number of ranks
    may load it, at any ZeRO stage; every rank calls.

    Raises:
        UserError: the engine has 16-bit weights without fp32 ones (ZeRO-0), with sharded experts.
    """
    if experts.mesh.ep_size > 1 and engine.zero_optimization_stage() == 0:
        require(
            not (engine.bfloat16_enabled() or engine.fp16_enabled()),
            "bf16 or fp16 with sharded experts: needs zero_optimization.stage 1, 2 or 3, which keep the fp32 weights",
        )
        engine.clip_fp32_gradients = functools.partial(_clip, engine, experts)
    engine.save_checkpoint = functools.partial(_save, engine)
    engine.load_checkpoint = functools.partial(_load, engine)


def _clip(engine: Any, experts: PlannedExperts) -> None:
    """Clip the gradients to the engine's largest norm, with the norm of the whole model."""
    parameters = list(engine.module.parameters())
    norm = total_grad_norm(parameters, experts.comm)
    nn.utils.clip_grads_with_norm_(parameters, engine.gradient_clipping(), norm)
    engine._global_grad_norm = norm


def _save(engine: Any, save_dir: Any, tag: Any = None, client_state: Any = None, **_: Any) -> bool:
    """Save in place of DeepSpeed's save_checkpoint."""
    require(not client_state, "save_checkpoint with client_state: must be saved apart from a model with expert layers")
    folder = Path(save_dir) / (str(tag) if tag is not None else f"global_step{engine.global_steps}")
    save_pretrained(engine, folder)
    with replacing(folder.parent / _LATEST) as file:  # the same on every rank
        file.write_text(folder.name)
    return True


def _load(engine: Any, load_dir: Any, tag: Any = None, *_: Any, **options: Any) -> tuple[str, dict[str, Any]]:
    """Load in place of DeepSpeed's load_checkpoint."""
    latest = Path(load_dir) / _LATEST
    require(tag is not None or latest.is_file(), f"{latest}: missing, so {load_dir} holds no checkpoint")
    folder = Path(load_dir) / (str(tag) if tag is not None else latest.read_text().strip())
    load_pretrained(engine, folder, weights_only=not options.get("load_optimizer_states", True))
    return str(folder), {}
