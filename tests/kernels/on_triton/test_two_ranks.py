"""Steps of experiment=debug on two ranks, through DeepSpeed with shared experts: the Triton backend equals the CPU
backend."""

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from torch import distributed as dist

from foreroute.engine.config import Config
from foreroute.engine.data.corpus import prepare
from foreroute.engine.model.build import build_model, build_routers
from foreroute.engine.optim import deepspeed_engine as adapter
from foreroute.engine.parallel.cpu_group import GlooGroup
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.parallel.world import World
from foreroute.engine.testing.ranks import run_ranks
from foreroute.engine.train.trainer import Trainer
from foreroute.kernels.launching import recording
from foreroute.kernels.testing.interpreter import guarded
from foreroute.launch.start.cli import CONF

STEPS = 2


class Losses:
    def __init__(self):
        self.values = []

    def note(self, line):
        pass

    def step(self, step):
        pass

    def metrics(self, step, values, seconds_left):
        self.values.append(values["loss"])


def debug_config(folder, *options):
    ConfigStore.instance().store("schema", Config)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_object(compose("train", ["experiment=debug", *options, f"train.runs_dir={folder}"]))


def options_of(folder, backend):
    return [
        "corpus=file",
        f"corpus.path={folder / 'text.txt'}",
        f"corpus.cache_dir={folder / 'cache'}",
        f"kernels.backend={backend}",
        f"train.name={backend}",
        f"train.steps={STEPS}",
        "train.log_every=1",
        "data.segment=8",
        "data.streams=2",
        "optim.lr=500",
        "optim.decay=constant",
        "kernels.masked_from_k=5",
        "parallel.expert_ranks=2",
        "optim.clip=0",
    ]


def steps(rank, folder):
    """Losses, parameters and kernels of both backends; the optimizer is linear, so parameters show every gradient."""
    adapter.build_optimizer = lambda params, _: torch.optim.Adam(params, 500.0, (0.0, 0.999), 1e3, fused=True)
    found = {}
    for backend in ("cpu", "triton"):
        config = debug_config(folder, *options_of(folder, backend))
        world = World(Mesh(rank, 2, 2), cpu_group=GlooGroup(dist.group.WORLD), planning=GlooGroup(dist.new_group()))
        corpus, losses = prepare(config.corpus), Losses()
        routers = build_routers(config, corpus, world.mesh)
        with guarded(), recording() as recorder:
            trainer = Trainer(config, corpus, routers, folder / backend, losses, world)
            trainer.run(None, lambda: False)
        weights = {name: p.detach().numpy() for name, p in trainer.model.named_parameters()}
        found[backend] = losses.values, weights, {launch.name for launch in recorder.launches}
    return found


@pytest.mark.dist
def test_two_ranks_equal_the_cpu_backend(tmp_path, watched):
    if watched is None:
        pytest.skip("several ranks run on the CPU so far: interpreted only")
    (tmp_path / "text.txt").write_bytes(b"the quick brown fox jumps over the lazy dog. " * 400)
    config = debug_config(tmp_path, *options_of(tmp_path, "cpu"))
    start = dict(build_model(config, prepare(config.corpus).vocab.size).named_parameters())
    for answer in run_ranks(steps, 2, tmp_path):
        (want_losses, want, none), (losses, weights, names) = answer["cpu"], answer["triton"]
        assert losses == pytest.approx(want_losses, rel=1e-6) and len(losses) == STEPS
        largest = max(np.linalg.norm(value) for value in want.values())
        moved = 0
        for name, value in want.items():
            difference = np.linalg.norm(weights[name] - value)
            assert difference < 1e-5 * np.linalg.norm(value) + 1e-7 * largest, name
            if value.shape == start[name].shape:
                moved += np.linalg.norm(value - start[name].detach().numpy()) > 1e-4
        assert moved > 5  # negative control: there was something to compare
        # rows are packed for the exchange and results added up by kernels, too
        assert names >= {
            "_tile_map_kernel",
            "_up_kernel",
            "_down_kernel",
            "_down_backward_kernel",
            "_weights_kernel",
            "_combine_kernel",
            "_permute_kernel",
        }
        assert none == set()
