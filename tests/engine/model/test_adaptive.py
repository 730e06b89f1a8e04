"""engine.model.adaptive against plain loops over all words in fp64, and on ranks that lack a cluster."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from foreroute.engine.config import KernelsConfig, ModelConfig, MoEConfig
from foreroute.engine.data.planned_batches import tail_tokens
from foreroute.engine.errors import UserError
from foreroute.engine.model.adaptive import Cluster, clusters, target_shares
from foreroute.engine.model.build import build_model
from foreroute.engine.model.flops import forward_flops
from foreroute.engine.model.transformer_xl import TransformerXL
from foreroute.engine.routing.plan import Routing
from foreroute.engine.testing.tiny_run import SEGMENT, STREAMS, tiny_config

V, CUTOFFS = 19, [5, 9, 14]
SIZES = {"layers": 1, "width": 16, "heads": 2, "head_width": 4, "memory": 5, "dropout": 0.0, "init_std": 0.3}
TWO_CLUSTERS = torch.tensor([[0, 4, 14, 18, 2, 3], [15, 0, 1, 1, 16, 2]])  # none of the second and third


def build(div_val: int, **options) -> TransformerXL:
    torch.manual_seed(0)
    model = ModelConfig(**SIZES, cutoffs=CUTOFFS, div_val=div_val, proj_init_std=0.4, **options)
    return TransformerXL(model, MoEConfig(router="dense", dense_width=8), KernelsConfig(), V).double()


def text(seed: int) -> Tensor:
    return torch.randint(V, (2, 6), generator=torch.Generator().manual_seed(seed))


# The reference: one word at a time; reads the model's parameters by name only.


def cluster_of(word: int) -> tuple[int, int]:
    cluster = sum(word >= cutoff for cutoff in CUTOFFS)
    return cluster, word - [0, *CUTOFFS][cluster]


def embed(weights: dict[str, Tensor], word: int) -> Tensor:
    cluster, place = cluster_of(word)
    row = weights[f"embedding.tables.{cluster}.weight"][place]
    return weights[f"embedding.projections.{cluster}"] @ row if "embedding.projections.0" in weights else row


def log_probabilities(weights: dict[str, Tensor], hidden_D: Tensor) -> Tensor:
    """Of all words."""

    def logit(cluster: int, place: int) -> Tensor:
        table, bias = weights[f"embedding.tables.{cluster}.weight"], weights[f"output.biases.{cluster}"]
        seen_D = hidden_D
        if "output.head_projection" in weights:
            name = f"embedding.projections.{cluster}" if cluster else "output.head_projection"
            seen_D = weights[name].T @ hidden_D
        return table[place] @ seen_D + bias[place]

    head_D = weights["output.head_projection"].T @ hidden_D if "output.head_projection" in weights else hidden_D
    ends = [0, *CUTOFFS, V]
    head = [logit(0, place).exp() for place in range(CUTOFFS[0])]
    head += [
        (row @ head_D + bias).exp()
        for row, bias in zip(weights["output.cluster_weight"], weights["output.cluster_bias"], strict=True)
    ]
    found = []
    for word in range(V):
        cluster, place = cluster_of(word)
        if cluster == 0:
            found.append((head[place] / sum(head)).log())
            continue
        tail = [logit(cluster, other).exp() for other in range(ends[cluster + 1] - ends[cluster])]
        found.append((head[CUTOFFS[0] + cluster - 1] / sum(head) * tail[place] / sum(tail)).log())
    return torch.stack(found)


def results(model: TransformerXL, ids: Tensor, targets: Tensor) -> dict[str, Tensor]:
    out = model(ids, targets, None, Routing(k=1))
    grads = torch.autograd.grad(out.loss, list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    return {"loss": out.loss.detach(), "nll": out.nll_BQ.flatten(), **dict(zip(names, grads, strict=True))}


def loops(model: TransformerXL, ids: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The same by the reference: between the ends it runs the model's own blocks."""
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}

    class Looked(torch.nn.Module):
        def forward(self, ids_BQ: Tensor) -> Tensor:
            return torch.stack([torch.stack([embed(weights, word) for word in row]) for row in ids_BQ.tolist()])

    own, model.embedding = model.embedding, Looked()
    blocks = {name: weight for name, weight in weights.items() if name.startswith(("blocks", "u", "v", "final"))}
    hidden = functional_hidden(model, blocks, ids)
    model.embedding = own
    rows = [log_probabilities(weights, hidden_D) for hidden_D in hidden.flatten(0, 1)]
    nll = torch.stack([-row[target] for row, target in zip(rows, targets.flatten().tolist(), strict=True)])
    grads = torch.autograd.grad(nll.mean(), list(weights.values()))
    return {"loss": nll.mean().detach(), "nll": nll.detach(), **dict(zip(weights, grads, strict=True))}


def functional_hidden(model: TransformerXL, blocks: dict[str, Tensor], ids: Tensor) -> Tensor:
    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.model.hidden(ids, None, Routing(k=1)).hidden_BQD

    renamed = {f"model.{name}": weight for name, weight in blocks.items()}
    return torch.func.functional_call(Hidden(), renamed, (ids,))


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        error = ((got[name] - value).norm() / value.norm().clamp(min=1e-9)).item()
        assert error < tolerance, f"{name}: {error:.2e}"


@pytest.mark.parametrize("targets", [text(1), TWO_CLUSTERS], ids=["all clusters", "two clusters"])
@pytest.mark.parametrize("div_val", [1, 2])
def test_equals_loops_over_all_words(div_val, targets):
    model = build(div_val)
    got = results(model, text(2), targets)
    assert_close(got, loops(model, text(2), targets), 1e-12)
    if targets is TWO_CLUSTERS:  # a cluster without targets has a gradient, of zeros
        assert not got["output.biases.1"].any() and got["output.biases.3"].any()


def test_div_val_4_equals_loops_over_all_words(monkeypatch):
    monkeypatch.setitem(SIZES, "width", 64)
    model = build(4)
    assert [table.weight.shape[1] for table in model.embedding.tables] == [64, 16, 4, 1]
    assert_close(results(model, text(2), text(1)), loops(model, text(2), text(1)), 1e-12)


def test_negative_control():
    model = build(2)
    want = loops(model, text(2), text(1))
    for name, parameter in model.named_parameters():
        if not name.startswith(("embedding", "output")):
            continue
        with torch.no_grad():
            parameter[0] += 1e-6  # all biases of a tail together change nothing
        with pytest.raises(AssertionError):
            assert_close(results(model, text(2), text(1)), want, 1e-12)
        with torch.no_grad():
            parameter[0] -= 1e-6


@pytest.mark.parametrize("div_val", [1, 2])
def test_probabilities_are_those_of_the_loss_and_add_up_to_one(div_val):
    model = build(div_val)
    out = model.logits(text(2), None, Routing(k=1))
    assert torch.allclose(out.logits_BQV.exp().sum(-1), torch.ones(2, 6).double())
    nll_BQ = -out.logits_BQV.gather(-1, text(1)[..., None]).squeeze(-1)
    assert torch.allclose(model(text(2), text(1), None, Routing(k=1)).nll_BQ, nll_BQ)


def test_the_plain_softmax_has_the_names_that_checkpoints_have():
    model = TransformerXL(ModelConfig(**SIZES), MoEConfig(router="dense", dense_width=8), KernelsConfig(), V)
    names = [name for name, _ in model.named_parameters() if not name.startswith("blocks")]
    assert names == ["output_bias", "u", "v", "embedding.weight"]


def test_published_parameter_count():
    """Transformer-XL base for WikiText-103 (run_wt103_base.sh): 151 million, 267,735 words."""
    words, width, inner, tails = 267_735, 410, 2100, 3
    block = 5 * 410 * width + 2 * inner * width + inner + width + 4 * width
    with torch.device("meta"):
        config = ModelConfig(layers=16, width=width, heads=10, head_width=41, cutoffs=[20000, 40000, 200000])
        model = TransformerXL(config, MoEConfig(router="dense", dense_width=inner), KernelsConfig(), words)
    found = sum(p.numel() for p in model.parameters())
    assert found == words * (width + 1) + tails * (width + 1) + 2 * 410 + 16 * block == pytest.approx(151e6, rel=0.01)


def test_clusters_and_their_shares():
    model = ModelConfig(width=16, cutoffs=[4, 7], div_val=2)
    found = clusters(model, 10)
    assert found == (Cluster(0, 4, 16), Cluster(4, 3, 8), Cluster(7, 3, 4))
    assert target_shares(torch.tensor([0, 3, 4, 6, 7, 9, 9, 9]).numpy(), found) == (0.25, 0.25, 0.5)
    assert clusters(ModelConfig(width=16), 10) == (Cluster(0, 10, 16),)


def test_flops_are_those_that_pytorch_counts():
    """The forward pass, exactly, but for what is done in vain: projections of other clusters' tokens."""

    def counted(**model) -> tuple[float, float]:
        config = tiny_config(model=model)
        config = replace(config, moe=MoEConfig(router="dense", dense_width=8))
        symbols, tokens = 60, STREAMS * SEGMENT
        ids = torch.randint(symbols, (STREAMS, SEGMENT), generator=torch.Generator().manual_seed(0))
        shares = target_shares(ids.flatten().numpy(), clusters(config.model, symbols))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            build_model(config, symbols)(ids, ids, None, Routing(1))
        in_vain = 0.0
        if model.get("div_val", 1) > 1:
            for number, (share, cluster) in enumerate(zip(shares, clusters(config.model, symbols), strict=True)):
                others = (1 - share) * (2 if number else 1)  # at the output the head is everybody's
                in_vain += 2 * tokens * others * cluster.width * config.model.width
        sizes = {"streams": STREAMS, "segment": SEGMENT, "vocab": symbols, "k": 1}
        useful = forward_flops(config.model, config.moe, **sizes, shares=shares)
        return counter.get_total_flops() - in_vain, useful

    plain, useful_plain = counted()
    for options in ({"cutoffs": [5, 40]}, {"cutoffs": [5, 40], "div_val": 2}):
        found, useful = counted(**options)
        assert found - plain == pytest.approx(useful - useful_plain, abs=1e-6)
        assert useful < useful_plain  # negative control: it is another number


@pytest.mark.parametrize(
    "options, message",
    [
        ({"cutoffs": [5, 5]}, r"model.cutoffs=\[5, 5\]: must be ids above 0, each larger"),
        ({"cutoffs": [0, 5]}, r"model.cutoffs=\[0, 5\]: must be ids above 0"),
        ({"cutoffs": [5, 7], "div_val": 5}, "model.div_val=5: leaves the last of 3 clusters no width"),
        ({"div_val": 0}, "model.div_val=0: must be at least 1"),
        ({"proj_init_std": -1.0}, "model.proj_init_std=-1.0: must be at least 0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        ModelConfig(width=16, **options)


def test_a_cutoff_beyond_the_vocabulary_is_refused():
    with pytest.raises(UserError, match=r"model.cutoffs=\[5, 19\]: must be below the 19 symbols"):
        clusters(ModelConfig(cutoffs=[5, 19]), V)


def test_planned_tails_change_nothing():
    """And an empty one, of a cluster without targets, is as good as none."""
    for div_val, targets in ((1, text(1)), (2, TWO_CLUSTERS)):
        model = build(div_val)
        tails = tail_tokens(targets, CUTOFFS)
        flat = targets.flatten().tolist()
        assert [tail.tolist() for tail in tails] == [
            [t for t, word in enumerate(flat) if cluster_of(word)[0] == cluster] for cluster in (1, 2, 3)
        ]
        want = model(text(2), targets, None, Routing(k=1))
        got = model(text(2), targets, None, Routing(k=1, tail_tokens=tails))
        assert torch.equal(got.loss, want.loss) and torch.equal(got.nll_BQ, want.nll_BQ)
    assert tail_tokens(text(1), []) == ()
