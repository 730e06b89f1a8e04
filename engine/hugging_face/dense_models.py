"""Dense models of transformers whose feed-forwards become experts: GPT-2, Llama, Qwen, Mistral, BERT, RoBERTa.

    model = BertModel.from_pretrained(folder)
    moe = MoEConfig(experts=8, ngram=1, rows=30522, weights=RouteWeights.sum, builder=Builder.random)
    experts = convert_model(model, Slices(), moe=moe, k=4)
    experts.attach(model, ids="input_ids", mask="attention_mask", layout="BQ")

The table says where a family's feed-forwards are; what they compute is read from their parameters
(engine/convert/dense.py). In BERT and RoBERTa one is two modules: the first matrix with its activation, and the second
matrix inside a module with the norm. They are joined in the place of the first, and the model computes what it did.

Dropout inside a replaced module goes with it (GPT-2's resid_pdrop after the feed-forward); `dropout` of
replace_feed_forwards drops hidden units of experts instead.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch import distributed as dist

from foreroute.engine.config import MoEConfig, to_plain
from foreroute.engine.convert import Adapters, Copies, Slices
from foreroute.engine.convert.selection import Batches, plan_slices
from foreroute.engine.errors import require
from foreroute.engine.plug_in.planned_experts import PlannedExperts
from foreroute.engine.plug_in.replace import replace_feed_forwards
from foreroute.engine.plug_in.saved.dense import dense_state_dict

NOTED = "foreroute"
"""The entry of a configuration of transformers that says how the model was converted."""
AnyStart = Copies | Slices | Adapters


class Family(NamedTuple):
    """Where the feed-forwards of a family are."""

    pattern: str  # whole names of their modules
    second: str = ""  # the module of the second matrix, from the block around; empty: inside the first


_LAYERS = Family(r"(.*\.)?layers\.\d+\.mlp")
_ENCODER = Family(r"(.*\.)?encoder\.layer\.\d+\.intermediate", "output.dense")
FAMILIES = {
    "gpt2": Family(r"(.*\.)?h\.\d+\.mlp"),
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral"), _LAYERS),
    **dict.fromkeys(("bert", "roberta"), _ENCODER),
}
"""By the `model_type` of a configuration of transformers."""


def convert_model(model: Any, start: AnyStart, **options: Any) -> PlannedExperts:
    """Turn the feed-forwards of a model of transformers into experts, and note in its configuration how.

    Args:
        start: as for replace_feed_forwards, which describes it.
        options: of replace_feed_forwards, without pattern, width and vocab_size.

    Raises:
        UserError: the family is not in the table, or a feed-forward computes something that experts do not.
    """
    experts = replace_feed_forwards(model, **_place(model), start=start, **options)
    noted = {"start": start.kind, "options": asdict(start), "moe": to_plain(experts.moe), "k": experts.k}
    setattr(model.config, NOTED, noted)
    return experts


def plan_family_slices(model: Any, batches: Batches, **options: Any) -> MoEConfig:
    """Plan the slices of a model of transformers on a calibration text, before it is converted.

    Args:
        batches: keyword arguments of the model's call.
        options: of plan_slices, without pattern, width and vocab_size.

    Raises:
        UserError: as for convert_model and plan_slices.
    """
    return plan_slices(model, batches=batches, **_place(model), **options)


def _place(model: Any) -> dict[str, Any]:
    """Return where a model's feed-forwards are and their width, after joining them; and the number of ids."""
    family = family_of(model)
    join_feed_forwards(model, family)
    embeddings: nn.Module = model.get_input_embeddings()
    rows, width = embeddings.get_parameter("weight").shape
    return {"pattern": family.pattern, "width": width, "vocab_size": rows}


def export_dense(model: Any, folder: Path | str) -> None:
    """Write a model whose feed-forwards are slices as the dense model, which from_pretrained reads without foreroute.

    A collective over all ranks; rank 0 writes.

    Raises:
        UserError: a layer is no slices.
    """
    state = separated(dense_state_dict(model), family_of(model))
    if not dist.is_initialized() or dist.get_rank() == 0:
        noted = model.config.__dict__.pop(NOTED, None)
        try:
            model.save_pretrained(folder, state_dict=state)
        finally:
            setattr(model.config, NOTED, noted)


def separated(state: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """Return a state with the names from before `join_feed_forwards`."""
    found = {}
    for key, value in state.items():
        joined = re.fullmatch(rf"((?:{family.pattern}))\.([01])\.(.+)", key) if family.second else None
        if joined is not None:
            name, part, inner = joined.group(1), *joined.groups()[-2:]
            key = f"{name}.{inner}" if part == "0" else f"{name.rpartition('.')[0]}.{family.second}.{inner}"
        found[key] = value
    return found


def family_of(model: Any) -> Family:
    """Return the family of a model of transformers.

    Raises:
        UserError: it is not in the table.
    """
    kind = model.config.model_type
    require(
        kind in FAMILIES,
        f"model_type={kind}: must be one of {', '.join(FAMILIES)}; others take replace_feed_forwards with a pattern",
    )
    return FAMILIES[kind]


def join_feed_forwards(model: nn.Module, family: Family) -> None:
    """Make each feed-forward that is two modules one module, in the place of the first."""
    if not family.second:
        return
    for name in [name for name, _ in model.named_modules() if re.fullmatch(family.pattern, name)]:
        second = f"{name.rpartition('.')[0]}.{family.second}"
        if isinstance(model.get_submodule(second), nn.Identity):
            continue  # joined before
        model.set_submodule(name, nn.Sequential(model.get_submodule(name), model.get_submodule(second)))
        model.set_submodule(second, nn.Identity())
