"""Qwen3-MoE, OLMoE and Mixtral of transformers on our exchange and kernels, against themselves.

As in tests/engine/plug_in/test_plug_in_on_ranks.py the optimizer is linear in the gradient, so that its update shows
every gradient with its scale.
"""

import copy
from contextlib import nullcontext

import deepspeed
import pytest
import torch
from torch import distributed as dist
from torch.nn.functional import cross_entropy

from foreroute.engine.config import ParallelConfig
from foreroute.engine.errors import UserError
from foreroute.engine.hugging_face.expert_models import (
    export_pretrained,
    export_state_dict,
    record_routes,
    replace_experts,
)
from foreroute.engine.plug_in import experts_of, load_pretrained, parameter_groups, save_pretrained
from foreroute.engine.testing.ranks import run_ranks

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.transformers
FAMILIES = ("qwen", "olmoe", "mixtral")
SYMBOLS, ROWS, LENGTH, LAYERS, EXPERTS, K = 61, 4, 9, 2, 8, 2
ADAM = {"lr": 5000.0, "betas": (0.0, 0.999), "eps": 1e3}  # the update is 5 times the gradient


def theirs(family, **options):
    """A tiny model with drawn weights, the same on all ranks."""
    sizes = {"vocab_size": SYMBOLS, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": LAYERS}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": K, "use_cache": False}
    sizes |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    if family == "qwen":
        kind, extra = "Qwen3Moe", {"num_experts": EXPERTS, "moe_intermediate_size": 24, "head_dim": 8}
        extra["norm_topk_prob"] = True
    elif family == "olmoe":
        kind, extra = "Olmoe", {"num_experts": EXPERTS}
    else:
        kind, extra = "Mixtral", {"num_local_experts": EXPERTS}
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **extra, **options})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def batch():
    ids = torch.randint(3, SYMBOLS, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(5))
    return ids[:, :-1], ids[:, 1:]


def forward(model, ids, targets, **options):
    logits = model(input_ids=ids, **options).logits
    return cross_entropy(logits.flatten(0, 1), targets.flatten()), logits


def error(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_theirs(family):
    """With their own balance loss, which they compute from what they read from their router modules."""
    want_model = theirs(family)
    model = copy.deepcopy(want_model)
    experts = replace_experts(model)
    ids, targets = batch()
    found = []
    for one in (model, want_model):
        output = one(input_ids=ids, labels=targets, output_router_logits=True)
        output.loss.backward()
        found.append(output)
    got, want = found
    assert error(got.logits, want.logits) < 1e-5 and len(got.router_logits) == LAYERS
    assert [got.loss.item(), got.aux_loss.item()] == pytest.approx([want.loss.item(), want.aux_loss.item()], rel=1e-6)
    assert experts.auxiliary_loss().item() == 0  # theirs is the only one
    gradients = {name: p.grad for name, p in want_model.named_parameters()}
    for name, parameter in model.named_parameters():
        if name in gradients:
            assert error(parameter.grad, gradients[name]) < 1e-5, name
    for number, layer in enumerate(experts.layers):
        place = f"model.layers.{number}.mlp"
        w1, w3 = gradients[f"{place}.experts.gate_up_proj"].chunk(2, dim=1)
        pairs = [(layer.experts.w1.grad, w1), (layer.experts.w3.grad, w3)]
        pairs += [(layer.experts.w2.grad, gradients[f"{place}.experts.down_proj"].transpose(1, 2))]
        pairs += [(layer.router.gate.weight.grad, gradients[f"{place}.gate.weight"])]
        assert all(error(*pair) < 1e-5 for pair in pairs)
        assert {name for name, _ in layer.experts.named_parameters()} == {"w1", "w2", "w3"}


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_new", "gelu_pytorch_tanh"])
def test_other_activations_are_theirs(activation):
    want_model = theirs("qwen", hidden_act=activation)
    model = copy.deepcopy(want_model)
    replace_experts(model)
    outputs = []
    for one in (model, want_model):
        loss, logits = forward(one, *batch())
        loss.backward()
        outputs.append((logits, one.get_input_embeddings().weight.grad))
    assert all(error(got, want) < 1e-5 for got, want in zip(*outputs, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_goes_home_bit_for_bit(family, tmp_path):
    model = theirs(family)
    model.save_pretrained(tmp_path / "theirs")
    want = {name: value.clone() for name, value in model.state_dict().items()}
    replace_experts(model)
    export_pretrained(model, tmp_path / "ours")
    files = sorted(file.name for file in (tmp_path / "theirs").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "ours").iterdir()) and "model.safetensors" in files
    for file in files:
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes(), file
    back = type(model).from_pretrained(tmp_path / "ours").state_dict()
    assert back.keys() == want.keys() and all(torch.equal(value, want[name]) for name, value in back.items())
    with torch.no_grad():
        experts_of(model).layers[1].experts.w3[5, 0, 0] += 1  # negative control
    state = export_state_dict(model)
    changed = [name for name, value in state.items() if not torch.equal(value, want[name])]
    assert changed == ["model.layers.1.mlp.experts.gate_up_proj"]


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_routes_give_their_outputs_and_gradients(family):
    """Of the model that recorded them; other routes give others."""
    want_model = theirs(family)
    model = copy.deepcopy(want_model)
    ids, targets = batch()
    routes = record_routes(want_model, input_ids=ids)
    assert routes.shape == (ROWS, LENGTH, LAYERS, K) and routes.max() < EXPERTS
    experts = replace_experts(model, replayed=True)
    want_loss, want_logits = forward(want_model, ids, targets)
    want_loss.backward()
    with experts.planned(ids, routes=routes):
        loss, logits = forward(model, ids, targets)
        loss.backward()
    assert error(logits, want_logits) < 1e-5
    gradients = {name: p.grad for name, p in want_model.named_parameters()}
    for number, layer in enumerate(experts.layers):
        assert error(layer.gate.weight.grad, gradients[f"model.layers.{number}.mlp.gate.weight"]) < 1e-5
    state = export_state_dict(model)
    assert all(torch.equal(state[name], value) for name, value in want_model.state_dict().items())
    with experts.planned(ids, routes=(routes + 1) % EXPERTS):
        assert error(forward(model, ids, targets)[1], want_logits) > 1e-2


def test_routes_are_recorded_of_a_replaced_model_too():
    model = theirs("olmoe")
    ids, _ = batch()
    want = record_routes(model, input_ids=ids)
    replace_experts(model)
    assert torch.equal(record_routes(model, input_ids=ids), want)
    with pytest.raises(UserError, match="NoRouters: no router of transformers ran; must have Qwen3MoeTopKRouter"):
        record_routes(NoRouters(), ids)


class NoRouters(torch.nn.Linear):
    """A model without routers."""

    def __init__(self):
        super().__init__(1, 1)

    def forward(self, ids):
        return transformers.modeling_outputs.CausalLMOutput(logits=ids[..., None])


def test_their_balance_loss_is_refused_for_replayed_routes():
    line = "output_router_logits=True: must be False with replayed routes, for which no router runs"
    with pytest.raises(UserError, match=line):
        replace_experts(theirs("qwen", output_router_logits=True), replayed=True)
    model = theirs("qwen")
    experts = replace_experts(model, replayed=True)
    ids, _ = batch()
    routes = torch.arange(K).expand(ROWS, LENGTH, LAYERS, K)
    with experts.planned(ids, routes=routes), pytest.raises(UserError, match=line):
        model(input_ids=ids, output_router_logits=True)


@pytest.mark.parametrize("replayed", [False, True])
def test_training_goes_on_from_a_saved_model(replayed, tmp_path):
    ids, targets = batch()
    routes = record_routes(theirs("qwen"), input_ids=ids)

    def begin():
        model = theirs("qwen")
        replace_experts(model, replayed=replayed)
        return model, torch.optim.Adam(model.parameters(), lr=0.01)

    def train(model, adam):
        losses = []
        for _ in range(2):
            with experts_of(model).planned(ids, routes=routes if replayed else None):
                loss, _ = forward(model, ids, targets)
            loss.backward()
            adam.step()
            adam.zero_grad()
            losses.append(loss.item())
        return losses

    model, adam = begin()
    train(model, adam)
    save_pretrained(model, tmp_path / "saved", optimizer=adam)
    want = train(model, adam)
    model, adam = begin()
    load_pretrained(model, tmp_path / "saved", optimizer=adam)
    assert train(model, adam) == want
    assert train(*begin()) != want  # negative control


def test_bf16_has_their_choices():
    """Their arithmetic decides near-ties; experts differ by bf16 alone. One layer: in a second it turns near-ties."""
    want_model = theirs("qwen", num_hidden_layers=1).bfloat16().eval()
    model = copy.deepcopy(want_model)
    replace_experts(model)
    ids, _ = batch()
    got, want = (one(input_ids=ids, output_router_logits=True) for one in (model, want_model))
    assert torch.equal(got.router_logits[0], want.router_logits[0])
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert error(got.logits.float(), want.logits.float()) < 0.05


def test_padding_has_no_expert_and_changes_nothing_else():
    want_model = theirs("qwen").eval()
    model = copy.deepcopy(want_model)
    experts = replace_experts(model)
    experts.attach(model, ids="input_ids", mask="attention_mask")
    ids, _ = batch()
    mask = torch.ones_like(ids)
    mask[1, :4], mask[3, :2] = 0, 0
    rows = []
    layer = experts.layers[0]
    layer.experts.register_forward_hook(lambda module, args, output: rows.append(int(args[1].count_E.sum())))
    got, want = (one(input_ids=ids, attention_mask=mask).logits for one in (model, want_model))
    assert error(got[mask > 0], want[mask > 0]) < 1e-5
    assert rows == [K * int(mask.sum())]


def test_recomputed_blocks_have_the_same_gradients():
    found = []
    for recompute in (False, True):
        model = theirs("mixtral")
        replace_experts(model)
        if recompute:
            model.activation_checkpointing_enable()
        loss, _ = forward(model, *batch())
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert all(error(value, found[0][name]) < 1e-6 for name, value in found[1].items())


def test_generation_with_a_cache_is_theirs():
    want_model = theirs("olmoe", use_cache=True).eval()
    model = copy.deepcopy(want_model)
    replace_experts(model)
    ids, mask = batch()[0][:2, :5], torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    got, want = (one.generate(ids, **options) for one in (model, want_model))
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("family", "options", "line"),
    [
        ("qwen", {"hidden_act": "mish"}, "model.layers.0.mlp: hidden_act of class MishActivation; must be one of ReLU"),
        ("mixtral", {"router_jitter_noise": 0.1}, "model.layers.0.mlp: router_jitter_noise=0.1; must be 0"),
        ("qwen", {"mlp_only_layers": [0, 1]}, "Qwen3MoeForCausalLM: has no expert block of transformers"),
    ],
)
def test_models_that_the_layer_cannot_be_are_refused(family, options, line):
    with pytest.raises(UserError, match=line):
        replace_experts(theirs(family, **options))


# On ranks.


def initialize(model, stage):
    config = {
        "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size(),
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
    }
    adam = torch.optim.Adam(parameter_groups(model.parameters()), **ADAM)
    return deepspeed.initialize(model=model, optimizer=adam, config=config)[0]


def step(rank, family, stage, options, *, replayed=False):
    """Errors of one case on this rank against their model in one process, and the collectives of a layer."""
    ids, targets = batch()
    want_model = theirs(family)
    start = {name: value.clone() for name, value in want_model.state_dict().items()}
    model = copy.deepcopy(want_model)
    experts = replace_experts(model, replayed=replayed, parallel=ParallelConfig(**options))
    engine = initialize(model, stage)
    exported = export_state_dict(engine.module)
    same = exported.keys() == start.keys() and all(torch.equal(v, start[name]) for name, v in exported.items())
    before = 0 if experts.comm is None else experts.comm.collectives

    routes = record_routes(want_model, input_ids=ids)
    adam = torch.optim.Adam(want_model.parameters(), **ADAM)
    want_loss, want_logits = forward(want_model, ids, targets)
    want_loss.backward()
    adam.step()
    here = [part.chunk(dist.get_world_size())[rank] for part in (ids, targets, want_logits, routes)]
    with experts.planned(here[0], routes=here[3]) if replayed else nullcontext():
        loss, logits = forward(engine, *here[:2])
        engine.backward(loss)
    engine.step()
    collectives = None if experts.comm is None else (experts.comm.collectives - before) / LAYERS
    errors = {"logits": error(logits, here[2])}
    trained = export_state_dict(engine.module)
    for name, want in want_model.state_dict().items():
        errors[name] = error(trained[name] - start[name], want - start[name])
    return same, errors, collectives


TWO = {"expert_ranks": 2}
CASES = {
    2: [
        (("qwen", 1, TWO), False),
        (("olmoe", 3, TWO), False),
        (("mixtral", 3, {**TWO, "chunks": 2}), False),
        (("mixtral", 1, {}), False),
        (("olmoe", 3, TWO), True),
        (("qwen", 1, {**TWO, "chunks": 2}), True),
    ],
    4: [
        ((family, stage, {"expert_ranks": size}), replayed)
        for family in FAMILIES
        for stage, size in ((1, 4), (3, 2), (3, 4))
        for replayed in (False, True)
    ],
}


def work(rank, cases):
    deepspeed.utils.logging.logger.setLevel("ERROR")
    return [step(rank, *case, replayed=replayed) for case, replayed in cases]


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_train_like_their_model_in_one_process(ranks):
    answers = run_ranks(work, ranks, CASES[ranks])
    for number, (case, replayed) in enumerate(CASES[ranks]):
        for answer in answers:
            same, errors, collectives = answer[number]
            assert same, case
            assert max(errors.values()) < 1e-5, (case, max(errors, key=errors.get), max(errors.values()))
            # rows there and back, in either direction, for each chunk
            want = 4 * case[2].get("chunks", 1)
            # counts and weights, and the weights' gradient
            want += 0 if replayed else 3
            assert collectives == (None if case[2] == {} else want)
