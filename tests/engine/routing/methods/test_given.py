"""Given routes are replayed token by token, on any ranks; recorded from a learned router they give its loss."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.counts.placement import Placement
from foreroute.engine.certificate.counts.replay import replay
from foreroute.engine.config import MoEConfig, PeerIds, RouteWeights, Split
from foreroute.engine.data.mixture import Mixture
from foreroute.engine.data.planned_batches import TrainingBatches, group_batch, plan_batch
from foreroute.engine.data.streams import Streams
from foreroute.engine.errors import UserError
from foreroute.engine.evaluation.held_out import evaluate
from foreroute.engine.evaluation.route_record import record_to
from foreroute.engine.model.build import RunModel, build_model
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.planned.given import NONE, GivenRouter, create_routes, finish_routes, open_routes
from foreroute.engine.routing.planned_router import BatchRoutes, GroupTokens, Places, RouterInputs, check_use
from foreroute.engine.testing.planned import plans_of
from foreroute.engine.testing.ranks import run_threads
from foreroute.engine.testing.tiny_run import EXPERTS, LAYERS, SEGMENT, STREAMS, SYMBOLS, K, tiny_config

TEXT = np.random.default_rng(0).integers(0, SYMBOLS, 900).astype(np.uint8)


class Corpus:
    """Two splits, as PreparedCorpus has them."""

    def __init__(self, text=TEXT):
        self.texts = {Split.train: text, Split.valid: TEXT[:301], Split.test: TEXT[300:]}

    def split(self, split):
        return self.texts[split]

    def previous_id(self, split):
        return 0 if split is Split.train else 3

    def document_starts(self, split):
        return np.empty(0, np.int64)

    def bits_per_byte(self, split, bits_per_symbol):
        return None


def write(path, ids, experts, weights=None, k=None):
    shape = experts.shape
    found, weight = create_routes(path, shape)
    found[:] = experts
    if weights is None:
        path.with_suffix(".weights.npy").unlink()
    else:
        weight[:] = weights
    finish_routes(path, ids, k or shape[2])
    return path


def drawn(tokens, columns=3, seed=0):
    """Experts of each token in each layer, distinct."""
    return np.random.default_rng(seed).random((tokens, LAYERS, EXPERTS)).argsort(axis=2)[..., :columns]


def given(moe=None, corpus=None, **files):
    files = {name: str(path) for name, path in files.items()}
    moe = moe or MoEConfig(experts=EXPERTS, expert_width=12, weights=RouteWeights.uniform)
    moe = replace(moe, router="given", options=files)
    corpus = corpus or Corpus()
    return GivenRouter.build(moe, RouterInputs(SYMBOLS, 1, LAYERS, splits=corpus.split))


def batches(routers, rank, ranks, peer_ids, group):
    config = tiny_config()
    config = replace(config, parallel=replace(config.parallel, expert_ranks=ranks, peer_ids=peer_ids))
    mesh = Mesh(rank, ranks, ranks)
    routers = [router.place(mesh) for router in routers]
    streams = Streams(TEXT, STREAMS, SEGMENT, config.context, start=0.3)
    return TrainingBatches(config, streams, mesh, routers, planning_group=group)


@pytest.mark.method
@pytest.mark.parametrize("peer_ids", PeerIds)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_each_token_has_the_experts_of_its_place(tmp_path, ranks, peer_ids):
    """Against a walk over the streams: over an end of an epoch, and with peers' places read or exchanged."""
    experts = drawn(len(TEXT))
    file, length = write(tmp_path / "routes.npy", TEXT, experts), len(TEXT) // STREAMS

    def plans(group):
        mine = batches(given(file=file), group.rank, ranks, peer_ids, group)
        return [mine.planned(step, 0).routing.plans for step in range(15)]

    per_epoch = (length - 1) // SEGMENT
    found = run_threads(plans, ranks)
    for step in range(15):
        first = (step + int(0.3 * per_epoch)) % per_epoch * SEGMENT
        inputs = np.concatenate([stream * length + first + np.arange(SEGMENT) for stream in range(STREAMS)])
        for layer in range(LAYERS):
            # a file's row of an input is the number of the id that follows
            chosen = [experts[place + 1, layer, :K].tolist() for place in inputs]
            for rank in range(ranks):
                plan, local = found[rank][step][layer], EXPERTS // ranks
                count = [sum(expert in row for row in chosen) for expert in range(EXPERTS)]
                assert plan.count_E.tolist() == count
                want = sorted(
                    (expert, token)
                    for token, row in enumerate(chosen)
                    for expert in row
                    if rank * local <= expert < (rank + 1) * local
                )
                (chunk,) = plan.chunks
                received = torch.arange(len(inputs)) if chunk.received_R is None else chunk.received_R
                expert_N = chunk.rows.expert_N() + rank * local
                got = zip(expert_N.tolist(), received[chunk.rows.source_N.long()].tolist(), strict=True)
                assert sorted(got) == want
                assert torch.equal(chunk.weight_N, torch.full((len(want),), 1 / K))


@pytest.mark.method
@pytest.mark.parametrize("router", ["learned", "frozen", "sigmoid_bias", "dynamic_top_p"])
@pytest.mark.parametrize("streams", [1, 3])
def test_a_replay_has_the_loss_of_the_live_router(tmp_path, router, streams):
    """Recorded with three streams; memory, several segments, a split that is no multiple of them."""
    config = tiny_config()
    config = replace(config, moe=replace(config.moe, router=router), eval=replace(config.eval, streams=3))
    run = RunModel(config, Corpus(), build_model(config, SYMBOLS), None)
    files = {}
    for split, name in ((Split.train, "file"), (Split.valid, "valid_file")):
        files[name] = tmp_path / f"{split.name}.npy"
        assert record_to(files[name], run, split, K).symbols == len(run.corpus.split(split))
    moe = replace(config.moe, router="given", weights=RouteWeights.table)
    replayed = replace(config, moe=moe, eval=replace(config.eval, streams=streams))
    model = build_model(replayed, SYMBOLS)
    state = {name: value for name, value in run.model.state_dict().items() if ".router." not in name}
    model.load_state_dict(state)
    routers = given(moe, run.corpus, **files)
    want = evaluate(run, split=Split.valid, k=K).bpc
    got = evaluate(RunModel(replayed, run.corpus, model, routers), split=Split.valid, k=K).bpc
    assert abs(got - want) < 1e-6
    uniform = given(replace(moe, weights=RouteWeights.uniform), run.corpus, **files)
    other = evaluate(RunModel(replayed, run.corpus, model, uniform), split=Split.valid, k=K).bpc
    assert abs(other - want) > 1e-6  # the control: other weights


def test_fewer_experts_have_the_softmax_over_them(tmp_path):
    logits = torch.randn(len(TEXT), LAYERS, 3, generator=torch.Generator().manual_seed(0)).sort(descending=True).values
    file = write(tmp_path / "routes.npy", TEXT, drawn(len(TEXT)), logits.softmax(dim=2).numpy())
    moe = MoEConfig(experts=EXPERTS, weights=RouteWeights.table)
    ids = torch.zeros(1, 1, 50, dtype=torch.int64)
    tokens = GroupTokens(ids, ids[..., :0], places=Places(Split.train, torch.tensor([[100]])))
    for layer, router in enumerate(given(moe, file=file)):
        for k in (1, 2, 3):
            want = logits[101:151, layer, :k].softmax(dim=1)
            torch.testing.assert_close(router.route(tokens, k).weight_TK, want)


def test_unequal_numbers_of_experts(tmp_path):
    """Some tokens have none; k is the mean with which they were recorded."""
    experts = drawn(len(TEXT)).astype(np.uint16)
    count = np.random.default_rng(1).integers(0, 4, experts.shape[:2])
    experts[np.arange(3) >= count[..., None]] = NONE
    router = given(file=write(tmp_path / "routes.npy", TEXT, experts, k=2))[1]
    ids = torch.from_numpy(TEXT[40:60].astype(np.int64)).view(1, 1, 20)
    tokens = GroupTokens(ids, ids[..., :0], places=Places(Split.train, torch.tensor([[40]])))
    plan = router.plan(tokens, 2)
    want = [expert for row in experts[41:61, 1] for expert in row if expert != NONE]
    assert plan.count_E.tolist() == np.bincount(want, minlength=EXPERTS).tolist()
    with pytest.raises(UserError, match="so k must be 2, as recorded"):
        check_use([router], Split.train, 1)


def test_routes_that_come_with_the_batch():
    """Without a file and a text: the first k, and all where real tokens have unequal numbers."""
    moe = MoEConfig(experts=EXPERTS, weights=RouteWeights.uniform, router="given")
    routers = GivenRouter.build(moe, RouterInputs(100, 0, LAYERS))
    ids = torch.zeros(2, 1, 10, dtype=torch.int64)
    experts = drawn(20).astype(np.uint16)
    real = torch.ones(2, 1, 10, dtype=torch.bool)
    real[1, 0, 7:] = False
    for varies in (False, True):
        experts[17:] = NONE  # padding
        if varies:
            experts[3, 1, 1:] = NONE
        routes = BatchRoutes(experts.reshape(2, 10, LAYERS, 3))
        tokens = GroupTokens(ids, ids[..., :0], routes=routes, real_PBQ=real)
        plan = plans_of(routers[1], tokens, 2)[0]
        kept = experts[:17, 1] if varies else experts[:17, 1, :2]
        want = np.bincount([expert for row in kept for expert in row if expert != NONE], minlength=EXPERTS)
        assert plan.k == 2 and plan.count_E.tolist() == want.tolist()


def test_routes_of_a_mixture_are_in_its_order(tmp_path):
    mixture = Mixture(TEXT, [400, 900], [2, 1], 50)
    experts = drawn(len(mixture))
    file = write(tmp_path / "routes.npy", mixture, experts)
    (router, _) = given(corpus=Corpus(mixture), file=file)
    batch = Streams(mixture, 2, 10, 0).batch(3, [0, 1])
    planned = plan_batch(group_batch([batch]), 2, [router])
    places = [first + place for first in (30, len(mixture) // 2 + 30) for place in range(10)]
    want = np.bincount(experts[[place + 1 for place in places], 0, :2].ravel(), minlength=EXPERTS)
    assert planned.routing.plans[0].count_E.tolist() == want.tolist()
    with pytest.raises(UserError, match=r"is for ids with sha256"):
        given(corpus=Corpus(np.asarray(mixture)[::-1].copy()), file=file)


FAULTS = {
    "no file": ({}, "moe.options.file is missing"),
    "unknown": ({"file": "a.txt"}, "a.txt: must be the name of a .npy file"),
    "absent": ({"file": "absent.npy"}, "No such file"),
    "tokens": ({"experts": drawn(7)}, r"has shape \[7, 2, 3\], must be \[900, 2, k\]"),
    "layers": ({"experts": drawn(900)[:, :1]}, r"has shape \[900, 1, 3\]"),
    "range": ({"put": (5, 1, 2, 4)}, r"token 5 has the experts \[.*, 4\] in layer 1; must be distinct, in 0 .. 3"),
    "twice": ({"put": (7, 0, slice(None), 1)}, r"token 7 has the experts \[1, 1, 1\] in layer 0; must be distinct"),
    "gap": ({"put": (7, 0, 0, NONE)}, "token 7 .* 65535 only after them"),
    "format": ({"experts": drawn(900), "dtype": np.int64}, "has int64, must be uint16"),
    "weights": ({"weights": RouteWeights.table}, "moe.weights=table: there are no weights beside"),
    "text": ({"ids": TEXT[::-1]}, "is for ids with sha256"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, monkeypatch, fault):
    monkeypatch.chdir(tmp_path)
    found, words = FAULTS[fault]
    experts = found.get("experts", drawn(900)).astype(np.uint16)
    if "put" in found:
        *place, value = found["put"]
        experts[tuple(place)] = value
    file = write(tmp_path / "routes.npy", found.get("ids", TEXT), experts)
    if "dtype" in found:
        np.save(file, experts.astype(found["dtype"]))
    moe = MoEConfig(experts=EXPERTS, weights=found.get("weights", RouteWeights.uniform))
    files = {"file": found.get("file", file)} if fault != "no file" else {}
    with pytest.raises(UserError, match=words) as error:
        given(moe, **files)
    assert "\n" not in str(error.value)


def test_other_text_and_more_experts_are_refused(tmp_path):
    (router, _) = given(file=write(tmp_path / "routes.npy", TEXT, drawn(900)))
    check_use([router], Split.train, 3)
    with pytest.raises(UserError, match=r"k=4: .* has 3 experts of a token"):
        check_use([router], Split.train, 4)
    with pytest.raises(UserError, match=r"moe.options.test_file is missing: .* the test split"):
        check_use([router], Split.test, 1)
    ids = torch.zeros(1, 1, 3, dtype=torch.int64)
    with pytest.raises(UserError, match="of the splits of the run's text alone"):
        router.choose(GroupTokens(ids, ids[..., :0]), 1)
    (tmp_path / "routes.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match="must be an object"):
        open_routes(tmp_path / "routes.npy", TEXT, layers=LAYERS, columns=EXPERTS)


def test_a_certificate_counts_them(tmp_path):
    """Rows from rank to rank, against the plans of all ranks."""
    file = write(tmp_path / "routes.npy", TEXT, drawn(len(TEXT)))
    config = tiny_config()
    config = replace(config, moe=replace(config.moe, router="given"))
    layout = Layout(config, Placement(2, 2, 2))
    ranks = [batches(given(file=file), rank, 2, PeerIds.corpus, None) for rank in range(2)]
    streams = layout.read(TEXT)
    for counts in replay(layout, TEXT, given(file=file), range(4)):
        step = counts.step
        plans = [replace(mine, streams=streams).planned(step, 0).routing.plans for mine in ranks]
        for layer in range(LAYERS):
            sent = [list(plans[rank][layer].send_splits) for rank in range(2)]
            assert counts.sent_ymgPP[layer, 0, 0].tolist() == sent
            assert counts.count_ymgE[layer, 0, 0].tolist() == plans[0][layer].count_E.tolist()
