"""Small models of five families with random weights, each converted in every way that preserves its output.

Letters: B sequences, Q ids.
"""

import copy
import tempfile
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from foreroute.engine.config import Builder, MoEConfig, RouteWeights
from foreroute.engine.convert import Adapters, Copies, Slices
from foreroute.engine.hugging_face.dense_models import AnyStart, convert_model, export_dense
from foreroute.engine.plug_in.planned_experts import PlannedExperts

VOCABULARY, EXPERTS, PAD = 50, 4, 1
_SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_IDS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": 3}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {"n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0},
    "LlamaForCausalLM": {**_SIZES, "num_key_value_heads": 2},
    "Qwen3ForCausalLM": {**_SIZES, "num_key_value_heads": 2, "head_dim": 16},
    "BertModel": {**_SIZES, **_NO_DROPOUT},
    "RobertaForMaskedLM": {**_SIZES, **_NO_DROPOUT},  # its positions begin at pad_token_id + 1
}


class Differences(NamedTuple):
    """Relative differences of outputs from those of the dense model."""

    copies: float  # the largest over all k
    slices: float  # with all slices
    adapters: float
    round_trip: float  # of the weights exported from slices, from those of the dense model; the largest


def random_model(name: str) -> Any:
    """Build a model with random weights, biases and norms."""
    disable_progress_bar()
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**_IDS, **FAMILIES[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def padded_batch() -> dict[str, Tensor]:
    """Return ids with padding on the right."""
    ids_BQ = torch.randint(4, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(1))
    mask_BQ = torch.ones_like(ids_BQ)
    mask_BQ[1, 5:], mask_BQ[2, 3:] = 0, 0
    return {"input_ids": ids_BQ.masked_fill(mask_BQ == 0, PAD), "attention_mask": mask_BQ}


def convert(model: Any, start: AnyStart, *, experts: int = EXPERTS, k: int, **moe: Any) -> PlannedExperts:
    """Convert a model with a table of random orders for each id, and let it plan from its own ids."""
    weights = RouteWeights.table if start.sums_to_1 else RouteWeights.sum
    rows = model.get_input_embeddings().weight.shape[0]
    options = {"ngram": 1, "rows": rows, "builder": Builder.random, "weights": weights, **moe}
    found = convert_model(model, start, moe=MoEConfig(experts=experts, **options), k=k)
    found.attach(model, ids="input_ids", mask="attention_mask", layout="BQ")
    return found


@torch.no_grad()
def difference(model: nn.Module, dense: nn.Module, batch: dict[str, Tensor]) -> float:
    """Return the norm of the outputs' difference divided by that of the dense model's, without padding."""
    real_BQ = batch["attention_mask"].bool()
    got, want = (one(**batch)[0][real_BQ] for one in (model, dense))
    return float((got - want).norm() / want.norm())


def differences(dense: Any, batch: dict[str, Tensor], experts: int = EXPERTS) -> Differences:
    """Convert a model in every way, and compare."""
    model = copy.deepcopy(dense)
    found = convert(model, Copies(), experts=experts, k=1)
    copies = []
    for found.k in range(1, experts + 1):
        copies.append(difference(model, dense, batch))
    model = copy.deepcopy(dense)
    convert(model, Slices(), experts=experts, k=experts)
    slices = difference(model, dense, batch)
    with tempfile.TemporaryDirectory() as folder:
        export_dense(model, folder)
        again = type(dense).from_pretrained(folder).state_dict()
    round_trip = max((again[key] - value).abs().max().item() for key, value in dense.state_dict().items())
    model = copy.deepcopy(dense)
    convert(model, Adapters(), experts=experts, k=2)
    return Differences(max(copies), slices, difference(model, dense, batch), round_trip)
