"""Sampling: top-p keeps the fewest ids that reach p, temperature 0 is the arg max."""

import math

import numpy as np
import pytest
import torch

from foreroute.engine.config import Config, DataConfig, EvalConfig, KernelsConfig, ModelConfig, MoEConfig
from foreroute.engine.config.enums import Keys
from foreroute.engine.errors import UserError
from foreroute.engine.evaluation.generate import Contrast, Sampling, contrasted, generate, sample
from foreroute.engine.model.build import RunModel
from foreroute.engine.model.transformer_xl import TransformerXL
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.plan import Routing
from foreroute.engine.routing.tables import build_tables
from foreroute.engine.testing.routers import hashed_of


def draws(logits, temperature, top_p, count=2000):
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(temperature, top_p, generator)
    found = [sample(logits, sampling) for _ in range(count)]
    return torch.bincount(torch.tensor(found), minlength=len(logits)) / count


def test_temperature_zero_takes_the_most_probable():
    assert sample(torch.tensor([0.1, 2.0, -1.0]), Sampling(0, 1.0, torch.Generator())) == 1


def test_top_p_cuts_the_tail():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert draws(logits, 1.0, 0.6)[2:].sum() == 0  # 0.5 does not reach 0.6, 0.5 + 0.3 does
    assert draws(logits, 1.0, 0.6)[1] > 0.3
    assert draws(logits, 1.0, 0.4)[0] == 1  # at least one id stays
    assert (draws(logits, 1.0, 1.0) - torch.tensor([0.5, 0.3, 0.15, 0.05])).abs().max() < 0.04


def test_low_temperature_sharpens():
    logits = torch.tensor([0.6, 0.4]).log()
    assert draws(logits, 0.25, 1.0)[0] > 0.8 > draws(logits, 1.0, 1.0)[0]


@pytest.mark.parametrize(
    "options", [{"memory": 0}, {"memory": 3}, {"memory": 3, "cutoffs": [2, 9], "div_val": 2}], ids=str
)
def test_symbol_by_symbol_equals_a_whole_segment(options):
    """Greedy sampling inside one segment must agree with the model run over the whole text at once."""
    torch.manual_seed(0)
    config = Config(
        data=DataConfig(streams=1, segment=12),
        model=ModelConfig(layers=1, width=16, heads=2, head_width=8, dropout=0.0, init_std=0.5, **options),
        moe=MoEConfig(router="frozen", experts=4, expert_width=8),
        eval=EvalConfig(k=[2]),
        kernels=KernelsConfig(masked_from_k=5),
    )
    model = TransformerXL(config.model, config.moe, config.kernels, 20).eval()
    greedy = Sampling(0, 1.0, torch.Generator())
    prompt = [3, 1, 4]
    found = list(generate(RunModel(config, None, model, None), prompt, k=2, length=9, sampling=greedy))
    text = prompt[:]
    with torch.inference_mode():
        for _ in range(9):
            logits = model.logits(torch.tensor([text]), None, Routing(2)).logits_BQV
            text.append(int(logits[0, -1].argmax()))
    assert prompt + found == text


@pytest.mark.parametrize("reset", [True, False])
def test_a_document_that_ended_is_not_seen_any_more(reset):
    """With data.reset_memory what comes after an end is as if the prompt began there; the control sees all of it."""
    torch.manual_seed(0)
    moe = MoEConfig(experts=4, expert_width=8, ngram=3, rows=100)
    config = Config(
        data=DataConfig(streams=1, segment=12, reset_memory=reset),
        model=ModelConfig(layers=2, width=16, heads=2, head_width=8, memory=3, dropout=0.0, init_std=0.5),
        moe=moe,
        eval=EvalConfig(k=[2]),
        kernels=KernelsConfig(masked_from_k=5),
    )
    model = TransformerXL(config.model, moe, config.kernels, 20).eval()
    table = build_tables(moe, 20, np.arange(20), num_tables=1, seed=1, cache_dir=None)
    run, found = RunModel(config, None, model, hashed_of(table, Mesh())), []
    for prompt in ([3, 1, 4], [9, 2, 6, 5, 7, 3, 1, 4], [7, 7, 3, 1, 4]):
        greedy = Sampling(0, 1.0, torch.Generator())
        found.append(list(generate(run, prompt, k=2, length=9, sampling=greedy, document_ends=[7])))
    assert (found[0] == found[1] == found[2]) == reset
    first = [
        list(generate(run, prompt, k=2, length=5, sampling=greedy, document_ends=[7])) for prompt in ([], [7], [0])
    ]
    assert first[0] == first[1] != first[2]  # an empty prompt starts with an end


def test_shuffled_keys_are_refused_before_anything_is_sampled():
    config = Config(moe=MoEConfig(keys=Keys.shuffled))
    model = TransformerXL(ModelConfig(1, 8, 1, 8), MoEConfig(experts=2, expert_width=4), config.kernels, 20)
    with pytest.raises(UserError, match=r"moe\.keys=shuffled: a control that cannot generate"):
        generate(RunModel(config, None, model, None), [1], k=1, length=1, sampling=Sampling(0, 1.0, torch.Generator()))


@pytest.mark.parametrize(("beta", "alpha"), [(0.5, 0.1), (2.0, 0.0), (0.0, 0.3), (0.5, 1.0)])
def test_contrasted_logits_equal_a_plain_loop(beta, alpha):
    strong, weak = torch.randn(2, 9, generator=torch.Generator().manual_seed(3)).mul(2).unbind()
    found = contrasted(strong, weak, Contrast(1, beta, alpha)).tolist()
    best = max(strong.tolist())
    for one, other, z in zip(strong.tolist(), weak.tolist(), found, strict=True):
        kept = math.exp(one - best) >= alpha
        assert z == (pytest.approx((1 + beta) * one - beta * other, rel=1e-5, abs=1e-6) if kept else -math.inf)
    assert (sum(z > -math.inf for z in found) == 1) == (alpha == 1)


def test_contrast_of_nothing_is_plain_sampling_and_of_one_symbol_greedy():
    torch.manual_seed(0)
    config = Config(
        data=DataConfig(streams=1, segment=12),
        model=ModelConfig(layers=1, width=16, heads=2, head_width=8, memory=12, dropout=0.0, init_std=0.5),
        moe=MoEConfig(router="frozen", experts=4, expert_width=8),
        eval=EvalConfig(k=[2]),
        kernels=KernelsConfig(masked_from_k=5),
    )
    run = RunModel(config, None, TransformerXL(config.model, config.moe, config.kernels, 20).eval(), None)

    def text(contrast, temperature=1.0):
        sampling = Sampling(temperature, 1.0, torch.Generator().manual_seed(1))
        return list(generate(run, [3, 1, 4], k=3, length=20, sampling=sampling, contrast=contrast))

    assert text(Contrast(1, beta=0.0, alpha=0.0)) == text(None) != text(Contrast(1, beta=2.0, alpha=0.0))
    assert text(Contrast(1, beta=0.5, alpha=1.0)) == text(None, temperature=0.0) != text(None)
