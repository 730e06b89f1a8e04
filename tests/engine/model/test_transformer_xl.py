"""engine.model.transformer_xl against an independent Transformer-XL of plain loops in fp64, and against itself cut up
differently."""

import math

import pytest
import torch
from torch import Tensor

from foreroute.engine.config import Activation, KernelsConfig, ModelConfig, MoEConfig
from foreroute.engine.model.transformer_xl import Output, TransformerXL, extend_memory
from foreroute.engine.routing.plan import Routing

V = 11
DENSE = MoEConfig(router="dense", experts=3, expert_width=4)
FROZEN = MoEConfig(router="frozen", experts=4, expert_width=4)
NO_DROPOUT = {"dropout": 0.0}


def build(moe: MoEConfig = DENSE, **options) -> TransformerXL:
    torch.manual_seed(0)
    sizes = {"layers": 2, "width": 6, "heads": 2, "head_width": 4, "memory": 5, "init_std": 0.3}
    return TransformerXL(ModelConfig(**{**sizes, **options}), moe, KernelsConfig(), V)


def text(streams: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(V, (streams, length), generator=torch.Generator().manual_seed(seed))


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm().clamp(min=1e-9)).item()


# The reference: one stream, one query, one head at a time; reads the model's parameters by name only.


def layer_norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (variance + 1e-5).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def encoding(distance: int, width: int) -> Tensor:
    angles = [distance / 10000 ** (2 * i / width) for i in range(width // 2)]
    numbers = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return torch.tensor(numbers, dtype=torch.float64)


def attend(x_SD: Tensor, first: int, weights: dict[str, Tensor], name: str, **options) -> Tensor:
    """Attention output of the positions from `first` on, each seeing the ones up to itself."""
    u, v = weights["u"], weights["v"]
    heads, width = u.shape
    w_key, w_value = weights[f"{name}.key_value.weight"].chunk(2)
    rows = []
    for i in range(first, len(x_SD)):
        seen = [j for j in range(i + 1) if not options["same_length"] or i - j < options["limit"]]
        out = []
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            query = weights[f"{name}.query.weight"][part] @ x_SD[i]
            scores = []
            for j in seen:
                distance = min(i - j, options["clamp_len"] or i - j)
                r = weights[f"{name}.distance.weight"][part] @ encoding(distance, x_SD.shape[1])
                scores.append(((query + u[h]) @ (w_key[part] @ x_SD[j]) + (query + v[h]) @ r) / width**0.5)
            attention = torch.stack(scores).softmax(0)
            out.append(sum(attention[n] * (w_value[part] @ x_SD[j]) for n, j in enumerate(seen)))
        rows.append(weights[f"{name}.output.weight"] @ torch.cat(out))
    return torch.stack(rows)


def feed_forward(x_D: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    z = weights[f"{name}.w1.weight"] @ x_D + weights[f"{name}.w1.bias"]
    hidden = z.clamp(min=0)
    if f"{name}.w3.weight" in weights:
        hidden = z / (1 + (-z).exp()) * (weights[f"{name}.w3.weight"] @ x_D)
    return weights[f"{name}.w2.weight"] @ hidden + weights[f"{name}.w2.bias"]


def reference(weights: dict[str, Tensor], ids: Tensor, memory: list[Tensor], pre_norm: bool, **options):
    """Logits [Q, V] and new memory of one stream."""
    x, new_memory, layer = weights["embedding.weight"][ids], [], 0
    x = x * x.shape[1] ** 0.5
    while f"blocks.{layer}.attention.query.weight" in weights:
        name = f"blocks.{layer}"
        context, first = torch.cat((memory[layer], x)), len(memory[layer])
        new_memory.append(context[max(0, len(context) - options["limit"]) :])
        if pre_norm:
            context = layer_norm(context, weights, f"{name}.attention_norm")
            x = x + attend(context, first, weights, f"{name}.attention", **options)
            inner = layer_norm(x, weights, f"{name}.feed_forward_norm")
            x = x + torch.stack([feed_forward(row, weights, f"{name}.feed_forward") for row in inner])
        else:
            x = x + attend(context, first, weights, f"{name}.attention", **options)
            x = layer_norm(x, weights, f"{name}.attention_norm")
            x = x + torch.stack([feed_forward(row, weights, f"{name}.feed_forward") for row in x])
            x = layer_norm(x, weights, f"{name}.feed_forward_norm")
        layer += 1
    if pre_norm:
        x = layer_norm(x, weights, "final_norm")
    return x @ weights["embedding.weight"].T + weights["output_bias"], new_memory


OPTIONS = [
    {},
    {"pre_norm": True},
    {"activation": Activation.swiglu},
    {"same_length": True},
    {"clamp_len": 2},
    {"memory_len": 2, "same_length": True, "clamp_len": 3},
    {"memory_len": 0},
    {"memory_len": 9},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_equals_plain_loops(options):
    options = dict(options)
    moe = MoEConfig(**{**vars(DENSE), "activation": options.pop("activation", Activation.relu)})
    pre_norm = options.pop("pre_norm", False)
    model = build(moe, pre_norm=pre_norm, **NO_DROPOUT).double()
    limit = options.get("memory_len", 5)
    loops = {"limit": limit, "clamp_len": 0, "same_length": False, **options}
    loops.pop("memory_len", None)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    streams, memory = 2, None
    loop_memory = [[torch.zeros(0, 6, dtype=torch.float64)] * 2 for _ in range(streams)]
    for segment in range(2):  # the second segment has memory
        ids, targets = text(streams, 4, seed=segment), text(streams, 4, seed=10 + segment)
        out = model(ids, targets, memory, Routing(k=1), **options)
        nll = []
        for b in range(streams):
            logits, loop_memory[b] = reference(weights, ids[b], loop_memory[b], pre_norm, **loops)
            loop_memory[b] = [x.detach() for x in loop_memory[b]]
            nll += [-logits.log_softmax(-1)[q, targets[b, q]] for q in range(4)]
        loss = sum(nll) / len(nll)
        assert out.loss.item() == pytest.approx(loss.item(), rel=1e-6)  # taken in fp32
        memory = out.memory
        for layer in range(2):
            want = torch.stack([loop_memory[b][layer] for b in range(streams)])
            assert not memory[layer].requires_grad
            assert memory[layer].shape == want.shape
            assert relative_error(memory[layer], want) < 1e-12
        got = torch.autograd.grad(out.loss, list(model.parameters()))
        want_grads = torch.autograd.grad(loss, list(weights.values()))
        largest = max(grad.norm().item() for grad in want_grads)
        for name, gradient, want in zip(weights, got, want_grads, strict=True):
            error = (gradient - want).norm().item()
            assert error < 1e-6 * want.norm().item() + 1e-8 * largest, name  # the loss is fp32


def test_negative_control():
    model = build(**NO_DROPOUT).double()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids, empty = text(1, 4), [torch.zeros(0, 6, dtype=torch.float64)] * 2
    loops = {"limit": 5, "clamp_len": 0, "same_length": False}
    got = model.logits(ids, None, Routing(k=1)).logits_BQV[0]
    assert relative_error(got, reference(weights, ids[0], empty, False, **loops)[0]) < 1e-12
    for name in weights:
        changed = {**weights, name: weights[name] * 1.01 + 1e-3 * torch.randn_like(weights[name])}
        error = relative_error(got, reference(changed, ids[0], empty, False, **loops)[0])
        assert error > 1e-8, name


@pytest.mark.parametrize("router, trained, held", [("dense", 19_489_996, 0), ("frozen", 19_505_356, 16_448)])
def test_published_parameter_counts(router, trained, held):
    with torch.device("meta"):
        model = TransformerXL(ModelConfig(), MoEConfig(router=router), KernelsConfig(), 204)
    assert sum(p.numel() for p in model.parameters()) == trained
    assert sum(b.numel() for b in model.buffers()) == held


def test_init():
    model = build(width=64, head_width=32, init_std=0.05)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        else:
            mean = 1.0 if "norm" in name else 0.0
            assert p.mean().item() == pytest.approx(mean, abs=0.03), name
            assert p.std().item() == pytest.approx(0.05, rel=0.35), name  # 64 draws: 4 deviations


@pytest.mark.parametrize("pre_norm", [False, True])
def test_segments_with_memory_equal_one_long_segment(pre_norm):
    model = build(memory=12, pre_norm=pre_norm, **NO_DROPOUT).double()
    ids = text(2, 12)
    whole = model.logits(ids, None, Routing(k=1)).logits_BQV
    memory, parts = None, []
    for cut in (slice(0, 5), slice(5, 6), slice(6, 12)):
        out = model.logits(ids[:, cut], memory, Routing(k=1))
        memory = out.memory
        parts.append(out.logits_BQV)
    assert relative_error(torch.cat(parts, dim=1), whole) < 1e-12
    forgetful = model.logits(ids[:, 6:], None, Routing(k=1)).logits_BQV
    assert relative_error(forgetful, whole[:, 6:]) > 1e-3  # negative control


def test_causality():
    model = build().eval()
    ids = text(1, 9)
    before = model.logits(ids, None, Routing(k=1)).logits_BQV
    ids[0, 5] = (ids[0, 5] + 1) % V
    after = model.logits(ids, None, Routing(k=1)).logits_BQV
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(dim=-1).all()


@pytest.mark.parametrize("length, limit, want", [(3, 0, 0), (3, 2, 2), (3, 3, 3), (3, 5, 5), (3, 9, 7)])
def test_extend_memory(length, limit, want):
    memory, x = torch.arange(4.0).view(1, 4, 1), 4 + torch.arange(float(length)).view(1, length, 1)
    assert extend_memory(memory, x, limit).flatten().tolist() == list(range(7 - want, 7))


def train_step(model: TransformerXL, routing: Routing) -> tuple[Output, list[Tensor]]:
    torch.manual_seed(5)
    ids = text(2, 6)
    out = model(ids, ids.roll(-1, 1), (torch.ones(2, 3, 6),) * 2, routing)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return out, list(torch.autograd.grad(out.loss, parameters))


@pytest.mark.parametrize("moe", [DENSE, FROZEN], ids=["dense", "frozen"])
def test_recompute_changes_nothing(moe):
    model = build(moe, dropout=0.3, attention_dropout=0.2)
    routing = Routing(k=2, dropout_seed=7)
    plain, plain_grads = train_step(model, routing)
    model.recompute = True
    again, again_grads = train_step(model, routing)
    assert torch.equal(plain.loss, again.loss)
    for got, want in zip(again_grads, plain_grads, strict=True):
        assert torch.equal(got, want)
    other, _ = train_step(build(moe, **NO_DROPOUT), routing)
    assert not torch.equal(other.loss, plain.loss)  # dropout was on


@pytest.mark.parametrize("router", ["frozen", "learned"])
def test_expert_layers(router):
    model = build(MoEConfig(router=router, experts=4, expert_width=4), **NO_DROPOUT)
    out, _ = train_step(model, Routing(k=3))
    assert out.count_LE is not None
    assert out.count_LE.sum(dim=1).tolist() == [12 * 3] * 2
    auxiliary_loss = out.loss.item() - out.nll_BQ.mean().item()
    if router == "frozen":
        assert auxiliary_loss == pytest.approx(0.0, abs=1e-6)
    else:
        assert auxiliary_loss > 0.01  # two balance losses of about 1, weighted 0.01


def test_bf16_is_close():
    model = build(**NO_DROPOUT)
    ids = text(2, 6)
    want = model(ids, ids, None, Routing(k=1))
    got = model.bfloat16()(ids, ids, None, Routing(k=1))
    assert got.loss.dtype == got.nll_BQ.dtype == torch.float32
    assert got.loss.item() == pytest.approx(want.loss.item(), rel=0.02)  # 4e-3 per rounding, 2 layers


def test_empty_memory_forms():
    model = build().eval()
    ids = text(2, 4)
    forms = [None, (), (torch.zeros(2, 0, 6),) * 2]
    losses = [model(ids, ids, memory, Routing(k=1)).loss for memory in forms]
    assert losses[0] == losses[1] == losses[2]
