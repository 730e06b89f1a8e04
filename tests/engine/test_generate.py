"""Sampling: top-p keeps the fewest ids that reach p, temperature 0 is the arg max."""

import torch

from engine.generate import Sampling, sample


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
