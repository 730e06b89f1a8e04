"""Expert layers inside a model that is not ours, on one rank in plain PyTorch: what is replaced, plans, hooks,
recomputation.

tests/engine/plug_in/test_plug_in_on_ranks.py trains the same model with DeepSpeed.
"""

import contextlib
import copy
import io
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from foreroute.engine.config import Activation, Builder, MoEConfig, ParallelConfig
from foreroute.engine.config.enums import ExchangeKind
from foreroute.engine.errors import UserError
from foreroute.engine.plug_in import PlannedFeedForward, experts_of, parameter_groups, replace_feed_forwards

SYMBOLS, WIDTH, EXPERTS, K = 11, 15, 4, 2
MOE = MoEConfig(experts=EXPERTS, expert_width=12, ngram=2, rows=128, builder=Builder.random)
MLPS = r"layers\.\d+\.mlp"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 40), nn.ReLU(), nn.Linear(40, WIDTH))

    def forward(self, x):
        x = x + self.mix(x.cumsum(1))
        return x + self.mlp(self.norm(x))


class Theirs(nn.Module):
    """A small language model; `reentrant` recomputes its blocks in one or the other of PyTorch's ways."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, SYMBOLS)
        self.reentrant = reentrant

    def forward(self, ids, targets):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


def make(reentrant=None, moe=MOE, **options):
    torch.manual_seed(0)
    model = Theirs(reentrant)
    options = {"width": WIDTH, "vocab_size": SYMBOLS, "k": K, "seed": 3, "init_std": 0.3, **options}
    return model, replace_feed_forwards(model, MLPS, moe=moe, **options)


def batch(index=0, rows=4, length=9):
    ids = torch.randint(0, SYMBOLS, (rows, length + 1), generator=torch.Generator().manual_seed(index))
    return ids[:, :-1], ids[:, 1:]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def same(got, want):
    assert got.keys() == want.keys()
    return all(torch.equal(value, want[name]) for name, value in got.items())


# What is replaced.


def test_the_rest_of_the_model_stays():
    torch.manual_seed(0)
    before = {k: v.clone() for k, v in Theirs().state_dict().items() if ".mlp." not in k}
    state = torch.get_rng_state()
    model, experts = make()
    assert torch.equal(torch.get_rng_state(), state)  # make() builds the same model first
    after = model.state_dict()
    assert same({k: v for k, v in after.items() if ".mlp." not in k}, before)
    assert [type(layer.mlp) for layer in model.layers] == [PlannedFeedForward] * 2
    assert [layer.mlp.moe for layer in model.layers] == experts.layers
    names = ["_extra_state", *(f"moe.experts.{name}" for name in ("w1", "b1", "w2", "b2"))]
    names = [f"layers.{i}.mlp.{name}" for i in range(2) for name in names]
    assert sorted(name for name in after if ".mlp." in name) == sorted(names)
    w1, other = (layer.mlp.moe.experts.w1 for layer in model.layers)
    assert w1.std().item() == pytest.approx(0.3, rel=0.1) and not torch.equal(w1, other)
    assert torch.equal(make()[0].layers[0].mlp.moe.experts.w1, w1)
    assert not torch.equal(make(seed=4)[0].layers[0].mlp.moe.experts.w1, w1)


def test_number_format_and_mode_are_those_of_what_was_there():
    model = Theirs().bfloat16().eval()
    replace_feed_forwards(model, MLPS, width=WIDTH, vocab_size=SYMBOLS, moe=MOE, k=K)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    "pattern, fault",
    [
        (r"layer\.\d", "matches no module; the model's names begin with embed, layers, layers.0"),
        (".*", "the empty name is the model itself"),
        ("layers", "layers is a list of modules"),
        (r"layers\.0\.mlp.*", r"layers.0.mlp.0 lies inside layers.0.mlp, which matches too"),
        (r"layers\.0\.norm", r"layers.0.norm has fewer than two matrices with 15 rows or columns"),
        ("twin", r"twin is the same module as layers.0.mlp"),
        (r"layers\.1", r"layers.1 holds an expert layer"),
        (r"layers\.0\.mlp\.1", r"layers.0.mlp.1 has fewer than two matrices"),
        (r"layers\.0", r"layers.0 holds more than one feed-forward: norm.weight [15], norm.bias [15], mix.weight"),
        (r"layers\.0", r"match feed-forwards only (inside, layers.0.mlp would fit)"),
    ],
)
def test_unsuitable_modules_are_named(pattern, fault):
    model, _ = make()
    model.layers[0] = Block()
    if pattern == "twin":
        model.twin = model.layers[0].mlp
    with pytest.raises(UserError) as error:
        replace_feed_forwards(model, pattern, width=WIDTH, vocab_size=SYMBOLS, moe=MOE, k=K)
    assert fault in str(error.value)


@pytest.mark.parametrize(
    "options, fault",
    [
        ({"k": 5}, "k=5: must be in 1 .. 4"),
        ({"moe": replace(MOE, router="dense")}, "moe.router=dense: must be a router"),
        ({"moe": replace(MOE, router="strata", strata=2)}, "moe.strata=2: must be 1"),
        ({"moe": replace(MOE, router="sized", options={"sizes": [1, 1, 2]})}, "there is no text"),
        ({"moe": replace(MOE, router="top_p")}, "moe.router=top_p: its tables are made from a text"),
        ({"moe": replace(MOE, layers=1)}, "moe.layers=1: must be null"),
        ({"moe": replace(MOE, builder=Builder.balanced)}, "moe.builder=balanced: needs text_ids"),
        ({"text_ids": [3, 11]}, "text_ids: must be ids in 0 .. 10"),
        ({"text_ids": [0.5, 1.0]}, "text_ids of float64: must be whole numbers"),
        ({"text_ids": torch.ones(9, device="meta")}, "text_ids: is on the meta device"),
        ({"dropout": 1.0}, "^dropout=1.0: must be in"),
        ({"parallel": ParallelConfig(expert_ranks=2)}, "parallel.expert_ranks=2: start the process group first"),
    ],
)
def test_wrong_options_are_named(monkeypatch, options, fault):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)  # whatever ran before
    with pytest.raises(UserError, match=fault.replace(".", r"\.")):
        make(**options)


def test_tables_are_made_from_a_text():
    text = torch.randint(0, SYMBOLS, (500,), generator=torch.Generator().manual_seed(1))
    tables = [
        make(moe=replace(MOE, builder=builder, share_table=True), text_ids=given)[1].state_dict()["tables"]
        for builder, given in ((Builder.random, None), (Builder.balanced, text), (Builder.balanced, text.tolist()))
    ]
    (random,), (balanced,), (again,) = tables
    assert torch.equal(balanced["order_rE"], again["order_rE"])
    assert not torch.equal(balanced["order_rE"], random["order_rE"])


# What a layer computes.


def plain_layer(experts, layer, x_BQD, ids_BQ, left_BC, k):
    """Token by token and expert by expert; the row of a bigram is 11 * left + id, as all 121 fit into the table."""
    weights = {name: p.detach() for name, p in experts.layers[layer].experts.named_parameters()}
    tables = experts.state_dict()["tables"]
    table = tables[layer if len(tables) > 1 else 0]
    y_BQD = torch.zeros_like(x_BQD)
    for b, q in itertools.product(*map(range, ids_BQ.shape)):
        left = ids_BQ[b, q - 1] if q else left_BC[b, 0]
        row = SYMBOLS * int(left) + int(ids_BQ[b, q])
        chosen = table["order_rE"][row, :k].tolist()
        mixing = table["logits_rE"][row, :k].exp()
        for e, mix in zip(chosen, (mixing / mixing.sum()).tolist(), strict=True):
            z = weights["w1"][e] @ x_BQD[b, q] + weights["b1"][e]
            hidden = torch.relu(z)
            if "w3" in weights:
                hidden = nn.functional.silu(z) * (weights["w3"][e] @ x_BQD[b, q])
            y_BQD[b, q] += mix * (hidden @ weights["w2"][e] + weights["b2"][e])
    return y_BQD


@pytest.mark.parametrize("options", [{}, {"share_table": True, "activation": Activation.swiglu}])
def test_a_layer_equals_plain_loops(options):
    model, experts = make(moe=replace(MOE, **options))
    model.double()
    for layer in experts.layers:
        nn.init.normal_(layer.experts.b1)
        nn.init.normal_(layer.experts.b2)
    ids, left = batch()[0], batch(1, length=1)[0]
    x = torch.randn(*ids.shape, WIDTH, dtype=torch.float64)
    zeros = torch.zeros_like(left)
    for k in (1, 2, EXPERTS):
        experts.k = k
        with experts.planned(ids, left):
            got = [layer.mlp(x) for layer in model.layers]
        with experts.planned(ids):
            at_start = model.layers[1].mlp(x.flatten(0, 1)).view_as(x)
        want = [plain_layer(experts, i, x, ids, left, k) for i in range(2)]
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # mixing weights are fp32
        torch.testing.assert_close(at_start, plain_layer(experts, 1, x, ids, zeros, k), rtol=1e-6, atol=1e-6)
        assert not torch.allclose(got[1], at_start, atol=1e-3)  # negative control: the left context counts
        assert not torch.allclose(got[0], plain_layer(experts, 0, x, ids, left, k % EXPERTS + 1), atol=1e-3)


def test_dropout_is_of_the_pass_and_off_in_evaluation():
    model, experts = make(dropout=0.5)
    x = torch.randn(4, 9, WIDTH)
    ids, _ = batch()

    def run():
        with experts.planned(ids):
            return model.layers[0].mlp(x)

    first, second = run(), run()
    assert not torch.equal(first, second)
    model.eval()
    kept = run()
    assert torch.equal(run(), kept) and not torch.equal(kept, second)
    again, experts = make(dropout=0.5)
    model = again
    assert torch.equal(run(), first) and torch.equal(run(), second)


def test_passes_of_neighbouring_seeds_have_dropout_of_their_own():
    """A pass has the number seed x 2**32 + passes before it, so 4 billion passes of a seed meet no other's."""
    for seed in (0, 3):
        _, experts = make(seed=seed)
        for number in range(3):
            with experts.planned(batch()[0]):
                routing, _ = experts.call(0, torch.zeros(4, 9, WIDTH))
            assert routing.dropout_seed == seed * 2**32 + number


# Plans.


def test_a_missing_or_used_plan_raises():
    model, experts = make()
    ids, targets = batch()
    with pytest.raises(RuntimeError, match="has no plan: call the model inside"):
        model(ids, targets)
    plans = experts.plan(ids)
    with experts.planned(plans) as inside:
        assert inside is plans
        model(ids, targets)
        with pytest.raises(RuntimeError, match="has already run with this plan"):
            model(ids, targets)
        with pytest.raises(RuntimeError, match=r"planned\(\) inside planned\(\)"), experts.planned(ids):
            pass
    with experts.planned(plans), pytest.raises(RuntimeError, match="has already run with this plan"):
        model(ids, targets)
    with pytest.raises(RuntimeError, match="has no plan"):
        model(ids, targets)


def test_a_plan_of_another_batch_or_model_raises():
    model, experts = make()
    for shape in ((3, 9), (4, 8), (9, 4)):
        fault = r"x is \[4, 9, 15\]: the plan is for ids \[\d, \d\]"
        ids = torch.zeros(shape, dtype=torch.int64)
        with pytest.raises(ValueError, match=fault), experts.planned(ids):
            model(*batch())
    plans = make(seed=4)[1].plan(batch()[0])
    with pytest.raises(UserError, match="of other tables"), experts.planned(plans):
        pass


@pytest.mark.parametrize(
    "ids, left, fault",
    [
        (torch.zeros(9, dtype=torch.int64), None, r"ids of shape \[9\]: must be \[sequences, length\]"),
        (torch.zeros(2, 4, 9, dtype=torch.int64), None, r"of all ranks of the expert group, \[1, seq"),
        (torch.full((4, 9), 11), None, r"ids from 11 to 11, torch.int64: .* in 0 .. 10"),
        (torch.full((4, 9), -100), None, "ids from -100"),
        (torch.zeros(4, 9), None, "torch.float32: must be whole numbers"),
        (
            torch.zeros(4, 9, dtype=torch.int64),
            torch.zeros(4, 2, dtype=torch.int64),
            r"left of shape \[4, 2\]: must be \[4, 1\]",
        ),
        (torch.zeros(4, 9, dtype=torch.int64), torch.full((4, 1), 12), "left from 12"),
    ],
)
def test_wrong_ids_are_named(ids, left, fault):
    with pytest.raises(UserError, match=fault):
        make()[1].plan(ids, left)


def test_ids_of_any_integers_and_of_a_group_of_one():
    model, experts = make()
    ids, targets = batch()
    losses = []
    for given in (ids, ids.int(), ids.to(torch.uint8), ids[None]):
        with experts.planned(given):
            losses.append(model(ids, targets).item())
    assert len(set(losses)) == 1


def test_the_hook_plans_like_with():
    model, experts = make()
    (ids, targets), (others, _) = batch(), batch(1)
    with experts.planned(ids):
        want = model(ids, targets).item()
    with experts.planned(others):
        wrong = model(ids, targets).item()
    assert wrong != want  # negative control
    handle = experts.attach(model)
    assert [model(ids, targets).item() for _ in range(2)] == [want, want]
    with experts.planned(others):  # the hook leaves it alone
        assert model(ids, targets).item() == wrong
    with pytest.raises(RuntimeError, match="without argument 0"):
        model(ids=ids, targets=targets)
    handle.remove()
    handle = experts.attach(model, "ids")
    assert model(targets=targets, ids=ids).item() == want
    assert model(ids, targets).item() == want  # a name counts also where the call has places
    handle.remove()
    experts.attach(model, "tokens")
    with pytest.raises(RuntimeError, match="without argument 'tokens'"):
        model(ids, targets)


def test_plans_made_ahead():
    model, experts = make()
    batches = [batch(index) for index in range(6)]
    want, got = [], []
    for index, (ids, targets) in enumerate(batches):
        experts.k = 1 if index < 4 else 3
        with experts.planned(ids):
            want.append(model(ids, targets).item())
    experts.k = 1
    taken = []

    def loader():
        for number, item in enumerate(batches):
            taken.append(number)
            yield item

    for number, (plans, (ids, targets)) in enumerate(experts.ahead(loader())):
        assert len(taken) == min(number + 3, 6)  # two ahead
        if number == 1:
            experts.k = 3  # from batch 1 + 2 + 1 on
        with experts.planned(plans):
            got.append(model(ids, targets).item())
    assert got == want
    wrong = [batch()[0] + SYMBOLS]
    with pytest.raises(UserError, match="ids from"):
        next(experts.ahead([wrong]))


# Recomputation.


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("hook", [False, True])
def test_recomputation_changes_nothing(reentrant, hook):
    want, experts = make(dropout=0.3)
    ids, targets = batch()
    with experts.planned(ids):
        want(ids, targets).backward()
    model, experts = make(reentrant, dropout=0.3)
    if hook:
        experts.attach(model)
        model(ids, targets).backward()
    else:
        with experts.planned(ids):
            model(ids, targets).backward()
    assert same(gradients(model), gradients(want))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_by_another_plan_raises(reentrant):
    model, experts = make(reentrant)
    gone = "recomputed in backward, but the plan of its forward pass is gone"
    ids, targets = batch()
    with experts.planned(ids):
        loss = model(ids, targets)
    with pytest.raises(RuntimeError, match=gone):
        loss.backward()
    with experts.planned(ids):
        loss = model(ids, targets)
    with pytest.raises(RuntimeError, match=gone), experts.planned(batch(1)[0]):
        loss.backward()  # its layers have not run with this plan


@pytest.mark.parametrize("reentrant", [False, True])
def test_attached_recomputation_is_by_the_plan_of_its_own_graph(reentrant):
    """Two passes, then their backward in either order: the gradient is the sum, as without recomputation."""
    for order in (1, -1):
        found = []
        for how in (None, reentrant):
            model, experts = make(how)
            experts.attach(model)
            losses = [model(*batch(index)) for index in range(2)]  # of the same size
            for loss in losses[::order]:
                loss.backward()
            found.append(gradients(model))
        assert same(*found)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("hook", [False, True])
def test_backward_may_run_in_another_thread(reentrant, hook):
    """As autograd's threads do for a GPU."""
    want, experts = make()
    with experts.planned(batch()[0]):
        want(*batch()).backward()
    model, experts = make(reentrant)
    with contextlib.ExitStack() as inside, ThreadPoolExecutor(1) as thread:
        if hook:
            experts.attach(model)
        else:
            inside.enter_context(experts.planned(batch()[0]))
        loss = model(*batch())
        if hook:
            thread.submit(model, *batch(1)).result()  # the thread had a pass of its own before
        thread.submit(loss.backward).result()
    assert same(gradients(model), gradients(want))


@pytest.mark.filterwarnings("ignore")  # Dynamo looks at attributes that warn
def test_a_compiled_model_answers_the_same():
    model, experts = make()
    experts.attach(model)
    compiled = torch.compile(model, backend="eager")
    for index in range(3):
        want = model(*batch(index))
        got = compiled(*batch(index))
        assert got.item() == pytest.approx(want.item(), rel=1e-6)
    experts.k = 1  # negative control: nothing of the plan was kept
    assert compiled(*batch()).item() == pytest.approx(model(*batch()).item(), rel=1e-6)


def serve(model, ids, targets, start):
    """Losses and gradients of some batches, one after the other, all threads layer by layer at the same time."""
    found = []
    start.wait()
    for part in zip(ids, targets, strict=True):
        loss = model(*part)
        weights = [layer.mlp.moe.experts.w1 for layer in model.layers]
        found.append((loss.item(), torch.autograd.grad(loss, weights)))
    return found


@pytest.mark.parametrize("reentrant", [None, False])
def test_threads_have_plans_of_their_own(reentrant):
    """Each layer waits until both threads are there, so that every pass is interleaved with another; so is backward."""
    model, experts = make(reentrant)
    experts.attach(model)
    ids = torch.stack([batch(index)[0] for index in range(6)])
    targets = torch.stack([batch(index)[1] for index in range(6)])
    want = serve(model, ids, targets, threading.Barrier(1))
    turn = threading.Barrier(2)

    def pause(*_):
        turn.wait(60)

    for layer in model.layers:
        layer.register_forward_pre_hook(pause)
    with ThreadPoolExecutor(2) as threads:
        parts = [threads.submit(serve, model, ids[n::2], targets[n::2], turn) for n in range(2)]
        got = [part.result() for part in parts]
    for index, (loss, grads) in enumerate(want):
        found, others = got[index % 2][index // 2]
        assert found == loss and all(map(torch.equal, grads, others))
    assert len({loss for loss, _ in want}) == 6  # negative control: another's plan would show


class Planned(torch.utils.data.Dataset):
    """Plans in the loader's worker."""

    def __init__(self, experts):
        self.experts = experts

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.experts.plan(batch(index)[0]).k


@pytest.mark.parametrize("workers", [0, 1])
def test_planning_in_a_forked_worker_is_refused(workers):
    """Its thread of plans is the other process's: it would wait for ever."""
    _, experts = make()
    fork = "fork" if workers else None
    loader = torch.utils.data.DataLoader(Planned(experts), num_workers=workers, multiprocessing_context=fork)
    if not workers:
        assert [k.item() for k in loader] == [K, K]
        return
    with pytest.raises(UserError, match="planning in a forked process, such as a DataLoader's worker"):
        next(iter(loader))


def test_a_plan_is_not_seen_by_another_thread():
    model, experts = make()
    with (
        ThreadPoolExecutor(1) as threads,
        experts.planned(batch()[0]),
        pytest.raises(RuntimeError, match=r"no plan: .* in the same thread"),
    ):
        threads.submit(model, *batch()).result()


def test_a_failed_call_leaves_no_plan():
    model, experts = make()
    experts.attach(model)
    with pytest.raises(ValueError, match="batch_size"):
        model(batch()[0], torch.zeros(4, 5, 9, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="has no plan"):
        model.layers[0].mlp(torch.zeros(4, 9, WIDTH))


@pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:DeprecationWarning")  # as others may still use it
@pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:FutureWarning")  # from PyTorch 2.14 on
@pytest.mark.parametrize(
    "record",
    [
        lambda model, args: torch.jit.trace(model, args),
        lambda model, args: torch.export.export(model, args, strict=False),
        lambda model, args: torch.fx.symbolic_trace(model.layers[0].mlp),
    ],
)
def test_a_plan_is_not_recorded(record):
    model, experts = make()
    with pytest.raises(RuntimeError, match="cannot be traced, exported or captured"), experts.planned(batch()[0]):
        record(model, batch())


def test_a_whole_model_may_be_recomputed():
    ids, targets = batch()
    want, experts = make()
    with experts.planned(ids):
        want(ids, targets).backward()
    model, experts = make()
    experts.attach(model)
    checkpoint(model, ids, targets, use_reentrant=False).backward()
    assert same(gradients(model), gradients(want))


# State, groups.


def test_state_goes_on():
    model, experts = make(dropout=0.3)
    ids, targets = batch()
    for k in (1, 3):
        experts.k = k
        with experts.planned(ids):
            model(ids, targets)
    state, weights = experts.state_dict(), model.state_dict()
    with experts.planned(ids):
        want = model(ids, targets).item()
    model, experts = make(dropout=0.3, seed=9)
    with pytest.raises(UserError, match=r"with other tables: digest \w{16}, must be \w{16} as here"):
        model.load_state_dict(weights)
    experts.load_state_dict(state)  # the tables come first: weights belong to them
    model.load_state_dict(weights)
    assert experts.k == 3
    with experts.planned(ids):
        assert model(ids, targets).item() == want
    with pytest.raises(UserError, match=r"\(tables, experts\) = \(2, 4\): must be \(1, 4\)"):
        make(moe=replace(MOE, share_table=True))[1].load_state_dict(state)
    with pytest.raises(UserError, match=r"\(1, 2, 2\): must be \(0, 1, 1\)"):
        experts.load_state_dict({**state, "place": (1, 2, 2)})


def test_state_of_a_shared_table_goes_on():
    shared = replace(MOE, share_table=True)
    state = make(moe=shared, seed=4)[1].state_dict()
    assert len(state["tables"]) == 1 and state["place"] == (0, 1, 1)
    _, experts = make(moe=shared)
    experts.load_state_dict(state)
    assert torch.equal(experts.state_dict()["tables"][0]["order_rE"], state["tables"][0]["order_rE"])


@pytest.mark.parametrize("change", [lambda v: v / 3 + v / 3 + v / 3, torch.Tensor.bfloat16, torch.Tensor.half])
def test_averages_and_other_formats_keep_the_digest_of_the_tables(change):
    model, _ = make()
    model.load_state_dict({name: change(value) for name, value in model.state_dict().items()})
    with pytest.raises(UserError, match="with other tables"):
        make(seed=4)[0].load_state_dict(model.state_dict())


# Copies.


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def averaged(model):
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    return average.module


@pytest.mark.parametrize("how", [copy.deepcopy, through_a_file, averaged])
@pytest.mark.parametrize("hook", [False, True])
def test_a_copy_equals_the_original_and_plans_by_itself(how, hook):
    model, experts = make(dropout=0.3)
    ids, targets = batch()
    if hook:
        experts.attach(model)
    plans = experts.plan(ids)
    with experts.planned(plans):  # copied in the middle of a pass
        twin = how(model)
        copies = experts_of(twin)
        want = model(ids, targets)
    want.backward()
    assert copies is not experts and [layer.mlp.moe for layer in twin.layers] == copies.layers
    assert copies.replaced == experts.replaced and len(copies.replaced) == 2
    copies._passes = 0  # the dropout of the first pass
    if hook:
        got = twin(ids, targets)
    else:
        with pytest.raises(RuntimeError, match="has no plan"):
            twin(ids, targets)
        with copies.planned(ids):
            got = twin(ids, targets)
    got.backward()
    assert torch.equal(got, want) and same(gradients(twin), gradients(model))
    copies.k = 1
    with copies.planned(ids), experts.planned(ids):  # neither sees the other's
        assert not torch.equal(twin(ids, targets), want)
        model(ids, targets)
    assert experts.k == K


def test_a_model_without_our_layers_has_no_experts():
    with pytest.raises(UserError, match="of 0 calls of replace_feed_forwards: must be 1"):
        experts_of(Theirs())


def test_parameter_groups_take_what_optimizers_take():
    model, _ = make()
    everything = list(model.parameters())
    (group,) = parameter_groups(model.parameters())
    assert [id(p) for p in group["params"]] == [id(p) for p in everything]
    first, second = parameter_groups([{"params": everything[:2], "lr": 0.5}, {"params": iter(everything[2:])}])
    assert first["lr"] == 0.5 and len(first["params"]) == 2
    assert torch.optim.SGD([first, second], lr=0.1).param_groups[1]["lr"] == 0.1


def test_one_rank_takes_any_exchange():
    losses = []
    for parallel in (ParallelConfig(), ParallelConfig(exchange=ExchangeKind.gather, chunks=3)):
        model, experts = make(parallel=parallel)
        with experts.planned(batch()[0]):
            losses.append(model(*batch()).item())
    assert np.ptp(losses) == 0
