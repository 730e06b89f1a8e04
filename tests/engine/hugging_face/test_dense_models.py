"""Dense models of transformers whose feed-forwards became experts: their outputs, family by family; random weights."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

from foreroute.engine.config import Builder, MoEConfig, RouteWeights  # noqa: E402
from foreroute.engine.convert import Adapters, Copies, Slices  # noqa: E402
from foreroute.engine.hugging_face.dense_models import convert_model, export_dense  # noqa: E402

VOCABULARY, EXPERTS = 50, 4
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"vocab_size": VOCABULARY, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
OWN = {
    "GPT2LMHeadModel": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0}),
    "LlamaForCausalLM": ("Llama", {"num_key_value_heads": 2}),
    "Qwen3ForCausalLM": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    "BertModel": ("Bert", NO_DROPOUT),
    "RobertaForMaskedLM": ("Roberta", NO_DROPOUT),  # its positions begin at pad_token_id + 1
}


def their_model(name, **options):
    family, own = OWN[name]
    sizes = SIZES if family != "GPT2" else {key: SIZES[key] for key in SIZES if not key.startswith(("num", "hidden"))}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**sizes, **own, **options})
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():  # biases and norms begin with zeros and ones
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def batch():
    """Ids with padding on the right."""
    ids = torch.randint(4, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:], mask[2, 3:] = 0, 0
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


def convert(model, start, k, weights="table", **options):
    moe = MoEConfig(experts=EXPERTS, ngram=1, rows=VOCABULARY, builder=Builder.random, weights=RouteWeights[weights])
    experts = convert_model(model, start, moe=moe, k=k, **options)
    experts.attach(model, ids="input_ids", mask="attention_mask", layout="BQ")
    return experts


def apart(model, theirs):
    given = batch()
    real = given["attention_mask"].bool()
    got, want = (one(**given)[0][real] for one in (model, theirs))
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("name", OWN)
def test_outputs_are_theirs(name, tmp_path):
    """Copies at every k, slices and adapters with all; fewer slices differ, which shows that they are experts."""
    theirs = their_model(name)
    model = copy.deepcopy(theirs)
    experts = convert(model, Copies(), 1)
    assert len(experts.layers) == 2
    for k in range(1, EXPERTS + 1):
        experts.k = k
        assert apart(model, theirs) < 1e-5
    model = copy.deepcopy(theirs)
    experts = convert(model, Slices(), EXPERTS, "sum")
    assert apart(model, theirs) < 1e-5
    experts.k = 1
    assert apart(model, theirs) > 1e-3
    export_dense(model, tmp_path)
    again = type(theirs).from_pretrained(tmp_path)
    state = again.state_dict()
    assert all(torch.equal(state[key], value) for key, value in theirs.state_dict().items())
    assert not {name for name, _ in again.named_modules()} ^ {name for name, _ in theirs.named_modules()}
    model = copy.deepcopy(theirs)
    convert(model, Adapters(), 2)
    assert apart(model, theirs) == 0.0
