"""Tables from files: DeepSeek-V4's hash layer against plain loops and transformers' own block on 1, 2 and 4 ranks, and
which files are taken."""

import functools

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import distributed as dist

from foreroute.engine.config import KernelsConfig, MoEConfig, ParallelConfig, Split
from foreroute.engine.errors import UserError
from foreroute.engine.moe.exchange import build_exchange
from foreroute.engine.moe.layer import MoELayer
from foreroute.engine.parallel.collectives import ExpertGroupComm
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.plan import Routing
from foreroute.engine.routing.planned.token_table import TokenTableRouter, write_tables
from foreroute.engine.routing.planned_router import GroupTokens, RouterInputs
from foreroute.engine.testing.ranks import run_ranks
from foreroute.engine.testing.routers import plan_of, route_of
from tests.references.mixed_layer import layer as reference

SYMBOLS, EXPERTS, WIDTH, HIDDEN, K, TOKENS = 30, 8, 12, 10, 3, 48


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def a_table(rows=SYMBOLS, columns=K, experts=EXPERTS, seed=0):
    generator = np.random.default_rng(seed)
    return np.stack([generator.permutation(experts)[:columns] for _ in range(rows)])


def moe_of(file, **options):
    given = {"file": str(file)} | ({"tensor": options.pop("tensor")} if "tensor" in options else {})
    return MoEConfig(**{"router": "token_table", "experts": EXPERTS, "ngram": 1, "options": given, **options})


def build(file, number=1, vocab=SYMBOLS, **options):
    return TokenTableRouter.build(moe_of(file, **options), RouterInputs(vocab, 7, number))


def hash_moe(file, **options):
    live = {"weights": "live", "gate": "sqrt_softplus", "gate_scale": 1.5, "expert_width": HIDDEN}
    return moe_of(file, **live, **options)


def on_rank(rank, ranks, moe, tensors, ids, x, cotangent):
    """Output and gradients of this rank's part of the layer; those of replicated parameters summed over the ranks."""
    mesh, count = Mesh(rank, ranks, ranks), TOKENS // ranks
    (router,) = TokenTableRouter.build(moe, RouterInputs(SYMBOLS, 7, 1))
    made = MoELayer(WIDTH, moe, KernelsConfig(), 0).to(x.dtype)
    made.load_state_dict(tensors)
    if ranks > 1:
        made.keep_experts(mesh.local_experts(EXPERTS))
        made.connect(build_exchange(ExpertGroupComm(dist.group.WORLD), ParallelConfig(expert_ranks=ranks)))
    group = GroupTokens(ids.view(ranks, 1, count), torch.zeros(ranks, 1, 0, dtype=torch.int64))
    here = slice(rank * count, (rank + 1) * count)
    x_TD = x[here].clone().requires_grad_()
    y_TD = made(x_TD, Routing(K, (router.place(mesh).plan(group, K),))).y_TD
    y_TD.backward(cotangent[here])
    found = {"y": y_TD.detach(), "x": x_TD.grad}
    for name, parameter in made.named_parameters():
        found[name] = parameter.grad
        if ranks > 1 and not name.startswith("experts."):
            dist.all_reduce(parameter.grad)
    return {name: value.numpy() for name, value in found.items()}


def on_ranks(ranks, *arguments):
    """The whole layer's output and gradients."""
    answers = [on_rank(0, 1, *arguments)] if ranks == 1 else run_ranks(on_rank, ranks, ranks, *arguments)
    parts = {name: [torch.from_numpy(answer[name]) for answer in answers] for name in answers[0]}
    return {n: torch.cat(p) if n in "yx" or n.startswith("experts.") else p[0] for n, p in parts.items()}


def problem(dtype):
    ids = torch.randint(0, SYMBOLS, (TOKENS,), generator=torch.Generator().manual_seed(1))
    return ids, normal(TOKENS, WIDTH, seed=2).to(dtype), normal(TOKENS, WIDTH, seed=3).to(dtype)


@pytest.mark.dist
@pytest.mark.method
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_hash_layer_is_that_of_plain_loops(ranks, tmp_path):
    """Forward and every gradient, in fp64."""
    table = a_table()
    np.save(tmp_path / "tid2eid.npy", table)
    moe, (ids, x, cotangent) = hash_moe(tmp_path / "tid2eid.npy"), problem(torch.float64)
    made = MoELayer(WIDTH, moe, KernelsConfig(), 0)
    tensors = {name: normal(*p.shape, seed=10 + i) / 3 for i, (name, p) in enumerate(made.named_parameters())}
    got = on_ranks(ranks, moe, tensors, ids, x, cotangent)
    leaves = {name: value.clone().requires_grad_() for name, value in {"x": x, **tensors}.items()}
    want_y = reference(leaves["x"], table[ids].tolist(), leaves, "sqrt_softplus", True, 1.5)
    want_y.backward(cotangent)
    torch.testing.assert_close(got.pop("y"), want_y.detach(), rtol=1e-12, atol=1e-12)
    assert got.keys() == leaves.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, leaves[name].grad, rtol=1e-11, atol=1e-12)


@functools.cache
def transformers_block():
    """DeepSeek-V4's block with a hash layer, SwiGLU experts and a shared expert."""
    cause = "transformers with DeepSeek-V4 is not installed"
    module = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4", reason=cause)
    config = pytest.importorskip("transformers").DeepseekV4Config(
        vocab_size=SYMBOLS,
        hidden_size=WIDTH,
        moe_intermediate_size=HIDDEN,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=K,
        num_hidden_layers=1,
        mlp_layer_types=["hash_moe"],
        routed_scaling_factor=1.5,
        swiglu_limit=1e6,
    )
    config._experts_implementation = "eager"
    block = module.DeepseekV4SparseMoeBlock(config, 0)
    for index, parameter in enumerate(block.parameters()):
        parameter.data = normal(*parameter.shape, seed=40 + index).float() / 3
    block.gate.tid2eid.copy_(torch.from_numpy(a_table(seed=5)))
    return block


def from_transformers(of):
    """A layer's parameters, or their gradients, by our names."""
    w1, w3 = of(transformers_block().experts.gate_up_proj).chunk(2, dim=1)
    block, zeros = transformers_block(), torch.zeros
    found = {"experts.w1": w1, "experts.w3": w3, "experts.w2": of(block.experts.down_proj).transpose(1, 2)}
    found["gate.weight"] = of(block.gate.weight)
    for ours, theirs in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        found[f"shared.{ours}.weight"] = of(getattr(block.shared_experts, theirs).weight)
    biases = {"experts.b1": zeros(EXPERTS, HIDDEN), "experts.b2": zeros(EXPERTS, WIDTH)}
    biases |= {"shared.w1.bias": zeros(HIDDEN), "shared.w2.bias": zeros(WIDTH)}
    return {name: value.contiguous() for name, value in found.items()}, biases


@pytest.mark.dist
@pytest.mark.method
@pytest.mark.transformers
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_hash_layer_is_that_of_transformers(ranks, tmp_path):
    """With the table of its checkpoint, in fp32; its experts have no biases, ours are 0."""
    block, (ids, x, cotangent) = transformers_block(), problem(torch.float32)
    save_file({"layers.0.ffn.gate.tid2eid": block.gate.tid2eid.numpy()}, tmp_path / "model.safetensors")
    moe = hash_moe(
        tmp_path / "model.safetensors",
        tensor="layers.{layer}.ffn.gate.tid2eid",
        activation="swiglu",
        shared_width=HIDDEN,
    )
    weights, biases = from_transformers(lambda parameter: parameter.detach())
    got = on_ranks(ranks, moe, weights | biases, ids, x, cotangent)
    x_TD = x.clone().requires_grad_()
    block.zero_grad()
    y = block(x_TD[None], ids[None])[0]
    y.backward(cotangent)
    want, _ = from_transformers(lambda parameter: parameter.grad)
    for name, value in {"y": y.detach(), "x": x_TD.grad, **want}.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5)


def experts_of(router, k=K):
    """The experts of each id, as the router's routes have them."""
    ids = torch.arange(SYMBOLS)[None]
    return route_of(router, ids, torch.zeros(1, 0, dtype=torch.int64), k).expert_TK.numpy()


def test_files_in_every_form(tmp_path):
    one, other = a_table(), a_table(seed=1)
    np.save(tmp_path / "both.npy", np.stack([one, other]).astype(np.int32))
    save_file({"tid2eid.0": one, "tid2eid.1": other}, tmp_path / "both.safetensors")
    save_file({"gate.0": other, "gate.1": one, "rest": np.zeros(3)}, tmp_path / "named.safetensors")
    for name, want, options in (
        ("both.npy", (one, other), {}),
        ("both.safetensors", (one, other), {}),
        ("named.safetensors", (other, one), {"tensor": "gate.{layer}"}),
    ):
        found = build(tmp_path / name, 2, **options)
        assert all(np.array_equal(experts_of(router), table) for router, table in zip(found, want, strict=True))
    np.save(tmp_path / "one.npy", one)
    save_file({"any": one}, tmp_path / "one.safetensors")
    for name in ("one.npy", "one.safetensors"):
        assert all(np.array_equal(experts_of(router), one) for router in build(tmp_path / name, 2))


def test_a_wider_table_is_used_up_to_k_and_a_larger_k_is_refused(tmp_path):
    wide = a_table(columns=6)
    np.save(tmp_path / "wide.npy", wide)
    (router,) = build(tmp_path / "wide.npy")
    assert router.refusal(Split.train, 6) is None and router.refusal(Split.train, 7) is not None
    for k in (1, 4, 6):
        assert np.array_equal(experts_of(router, k), wide[:, :k])
    with pytest.raises(UserError, match=r"^k=7: the table of moe\.router=token_table lists 6 experts for each row$"):
        experts_of(router, 7)


def test_more_than_256_experts_and_columns_without_experts(tmp_path):
    many = a_table(experts=300)
    np.save(tmp_path / "many.npy", many)
    (router,) = build(tmp_path / "many.npy", experts=300)
    assert router.order_rK.dtype == torch.int16 and np.array_equal(experts_of(router), many)
    (router,) = build(tmp_path / "many.npy", experts=200, copy_experts=60, null_experts=40)
    plan = plan_of(router, torch.arange(SYMBOLS)[None, None], torch.zeros(1, 1, 0, dtype=torch.int64), K)
    assert plan.chunks[0].rows.num_rows == (many < 200).sum() == plan.count_E.sum()
    assert ((plan.column_weight_TJ > 0).sum(dim=1).numpy() == (many >= 200).sum(axis=1)).all()


def test_longer_n_grams_have_a_row_each_or_a_hash(tmp_path):
    ids, left = torch.tensor([[3, 4]]), torch.tensor([[7]])
    exact = a_table(rows=SYMBOLS**2)
    np.save(tmp_path / "exact.npy", exact)
    (router,) = build(tmp_path / "exact.npy", ngram=2)
    assert np.array_equal(route_of(router, ids, left, K).expert_TK, exact[[7 * SYMBOLS + 3, 3 * SYMBOLS + 4]])
    few = a_table(rows=11)
    np.save(tmp_path / "few.npy", few)
    (router,) = build(tmp_path / "few.npy", ngram=2)
    rows = router.key_rows.of(ids, left)[0]
    assert rows.max() < 11 and np.array_equal(route_of(router, ids, left, K).expert_TK, few[rows])


BAD = {
    "is float64 [30, 3]: must be whole numbers [rows, k]": lambda table: table.astype(float),
    "is int64 [30]: must be whole numbers [rows, k]": lambda table: table[:, 0],
    "has experts 0 .. 8: must be in 0 .. 7": lambda table: np.where(table == 7, 8, table),
    "has experts -1 .. 7: must be in 0 .. 7": lambda table: np.where(table == 0, -1, table),
    "row 4 lists an expert twice": lambda table: np.where(np.arange(30)[:, None] == 4, 2, table),
    "has 29 rows: moe.ngram=1 needs one for each of 30 ids": lambda table: table[:-1],
    "has 1 tables: expert layer 1 needs one": lambda table: table[None],
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_no_table_is_refused_in_one_line(message, tmp_path):
    file = tmp_path / "bad.npy"
    np.save(file, BAD[message](a_table()))
    with pytest.raises(UserError) as caught:
        build(file, 2)
    assert str(caught.value) == f"moe.options.file={file}: {message}"


def test_files_that_cannot_be_read_are_refused_in_one_line(tmp_path):
    for name in ("damaged.npy", "damaged.safetensors"):
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(UserError, match=f"^moe.options.file=.*{name}: cannot be read"):
            build(tmp_path / name)
    for name, message in (("none.npy", "cannot be read .No such file or directory."), ("a.txt", "must end with .npy")):
        with pytest.raises(UserError, match=f"^moe.options.file=.*{name}: {message}"):
            build(tmp_path / name)
    save_file({"a": a_table(), "b": a_table()}, tmp_path / "two.safetensors")
    with pytest.raises(
        UserError, match=r"^moe\.options\.tensor=tid2eid\.0: .*has no such tensor, but 2 others, such as"
    ):
        build(tmp_path / "two.safetensors")
    with pytest.raises(UserError, match=r"needs a table, moe\.options\.file=FILE"):
        TokenTableRouter.build(MoEConfig(router="token_table"), RouterInputs(SYMBOLS, 7, 1))
    with pytest.raises(UserError, match=r"^export=.*: must end with \.npy or \.safetensors$"):
        write_tables(tmp_path / "table.txt", [torch.zeros(2, 2, dtype=torch.uint8)])


def test_a_saved_model_needs_no_file(tmp_path):
    file = tmp_path / "table.npy"
    np.save(file, np.stack([a_table(), a_table(seed=1)]))
    routers = build(file, 2)
    file.unlink()
    again = TokenTableRouter.restore(moe_of(file), RouterInputs(SYMBOLS, 7, 2), [router.state() for router in routers])
    for one, other in zip(routers, again, strict=True):
        assert np.array_equal(experts_of(one), experts_of(other))
        assert all(np.array_equal(*pair) for pair in zip(one.identity(), other.identity(), strict=True))
    assert not np.array_equal(routers[0].identity()[1], routers[1].identity()[1])


def test_tables_are_written_in_the_form_that_is_read(tmp_path):
    tables = [torch.from_numpy(a_table(seed=seed).astype(np.uint8)) for seed in range(2)]
    for name in ("t.npy", "t.safetensors"):
        write_tables(tmp_path / name, tables)
        for router, table in zip(build(tmp_path / name, 2), tables, strict=True):
            assert torch.equal(router.order_rK, table)
        write_tables(tmp_path / name, tables[1:])
        assert all(torch.equal(router.order_rK, tables[1]) for router in build(tmp_path / name, 2))
