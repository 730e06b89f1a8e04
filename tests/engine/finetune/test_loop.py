"""Fine-tuning learns what can be learnt, keeps what did best on the held-out sentences, and is repeatable."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from foreroute.engine.config import KernelsConfig
from foreroute.engine.errors import RunFailed
from foreroute.engine.finetune.classifier import Classifier, predict
from foreroute.engine.finetune.loop import Recipe, finetune
from foreroute.engine.finetune.sentences import Sentence
from foreroute.engine.model.build import RunModel, build_model
from foreroute.engine.routing.planned.hashed import HashedRouter
from foreroute.engine.routing.tables import build_tables
from foreroute.engine.testing.tiny_run import EXPERTS, LAYERS, SYMBOLS, K, tiny_config

TOLD = SYMBOLS - 1
RECIPE = Recipe(k=K, steps=20, batch=8, lr=(0.01,), eval_every=10, seed=1)


class Quiet:
    """Keeps what fine-tuning says."""

    def __init__(self) -> None:
        self.steps, self.points = [], []

    def step(self, step):
        self.steps.append(step)

    def point(self, step, point):
        self.points.append((step, point))


def build(router: str, seed: int = 1) -> Classifier:
    config = tiny_config(dropout=0.1, seed=seed)
    config = replace(config, moe=replace(config.moe, router=router), kernels=KernelsConfig(masked_from_k=EXPERTS))
    routers = None
    if router == "hashed":
        tables = build_tables(
            config.moe, SYMBOLS, np.arange(500, dtype=np.uint8) % SYMBOLS, num_tables=LAYERS, seed=1, cache_dir=None
        )
        routers = [HashedRouter(table) for table in tables]
    return Classifier(RunModel(config, None, build_model(config, SYMBOLS), routers))


def task(count: int, seed: int) -> list[Sentence]:
    """The label says whether one of the ids is TOLD."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        ids = rng.integers(0, TOLD, rng.integers(3, 12)).astype(np.uint8)
        if i % 2:
            ids[rng.integers(len(ids))] = TOLD
        found.append(Sentence(ids, i % 2))
    return found


@pytest.mark.parametrize("router", ["hashed", "frozen", "learned", "dense"])
def test_learns_a_simple_task(router):
    classifier, unseen = build(router), task(300, seed=3)
    before = classifier.evaluate(unseen, K).accuracy
    recipe = replace(RECIPE, steps=60, batch=16, eval_every=20)
    finetune(classifier, task(1000, seed=1), task(200, seed=2), recipe, Quiet())
    after = classifier.evaluate(unseen, K).accuracy
    assert before.share < 0.7 and after.share > 0.9
    by_chance = [replace(s, label=i % 3 % 2) for i, s in enumerate(unseen)]
    assert classifier.evaluate(by_chance, K).accuracy.share < 0.7  # negative control


def test_the_best_point_is_kept():
    """A rate that ruins the model comes second and in vain; the kept weights are those of the chosen point."""
    classifier, quiet, held_out = build("hashed"), Quiet(), task(100, seed=2)
    recipe = replace(RECIPE, steps=40, lr=(0.01, 30.0))
    found = finetune(classifier, task(400, seed=1), held_out, recipe, quiet)
    assert [(point.lr, point.step) for point in found.curve] == [
        (lr, step) for lr in (0.01, 30.0) for step in range(10, 41, 10)
    ]
    best = max(point.held_out.correct for point in found.curve)
    assert found.chosen.lr == 0.01 and found.chosen.held_out.correct == best
    equal = [p.held_out_loss for p in found.curve if p.held_out.correct == best]
    assert found.chosen.held_out_loss == min(equal)
    logits = predict(classifier, held_out, K)
    label = torch.tensor([s.label for s in held_out])
    assert int((logits.argmax(1) == label).sum()) == found.chosen.held_out.correct
    assert classifier.evaluate(held_out, K).accuracy == found.chosen.held_out
    assert F.cross_entropy(logits, label).item() == pytest.approx(found.chosen.held_out_loss)
    assert found.curve[-1].held_out != found.chosen.held_out
    assert quiet.steps == list(range(1, 81)) and [s for s, _ in quiet.points] == list(range(10, 81, 10))
    assert found.sentences == 2 * 40 * 8


def test_every_rate_starts_from_the_same_weights():
    curves = []
    for rates in ((0.003,), (0.01, 0.003)):
        recipe = replace(RECIPE, lr=rates, steps=25)
        found = finetune(build("hashed"), task(300, seed=1), task(50, seed=2), recipe, Quiet())
        curves.append([point for point in found.curve if point.lr == 0.003])
    assert curves[0] == curves[1] and [point.step for point in curves[0]] == [10, 20, 25]


def test_the_same_seed_gives_the_same_weights():
    kept = []
    for seed in (1, 1, 2):
        classifier = build("hashed")
        finetune(classifier, task(300, seed=1), task(50, seed=2), replace(RECIPE, seed=seed), Quiet())
        kept.append(classifier.state_dict())
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    assert not torch.equal(kept[0]["head.3.weight"], kept[2]["head.3.weight"])


def test_the_whole_model_is_trained():
    """Everything but the language model's output bias, which a classifier does not use."""
    classifier = build("learned")
    before = {name: p.detach().clone() for name, p in classifier.named_parameters()}
    finetune(classifier, task(300, seed=1), task(50, seed=2), RECIPE, Quiet())
    unchanged = {n for n, p in classifier.named_parameters() if torch.equal(p, before[n])}
    assert unchanged == {"model.output_bias"}


def test_a_loss_that_is_not_finite_ends_it():
    classifier = build("dense")
    classifier.head[3].bias.data[0] = float("nan")
    with pytest.raises(RunFailed, match=r"the loss is nan at step 0, lr=0.01"):
        finetune(classifier, task(50, seed=1), task(50, seed=2), RECIPE, Quiet())


def test_the_number_of_active_experts_grows():
    """From k_min to k in equal parts, by the published formula; evaluation is at k."""
    classifier, seen = build("hashed"), []
    recipe = replace(RECIPE, k=EXPERTS, k_min=EXPERTS // 2, steps=8, eval_every=8)
    theirs = classifier.loss
    classifier.loss = lambda batch, k, seed: seen.append(k) or theirs(batch, k, seed)
    finetune(classifier, task(100, seed=1), task(50, seed=2), recipe, Quiet())
    half = EXPERTS // 2
    assert seen == [round(half * step / 8) + half for step in range(8)] and seen[0] < seen[-1]
    assert [RECIPE.k_at(step) for step in (0, 19)] == [K, K]
