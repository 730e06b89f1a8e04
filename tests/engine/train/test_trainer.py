"""The training loop end to end on a tiny text: learning, determinism, resume, and what happens when things go wrong."""

import itertools
import json
import math
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed as dist

import foreroute.engine.train.trainer
from foreroute.engine.checkpoint import save_load as checkpoint
from foreroute.engine.config import (
    Config,
    Corpus,
    CorpusConfig,
    DataConfig,
    EvalConfig,
    Gate,
    Growth,
    KernelsConfig,
    Keys,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    Precision,
    RouteWeights,
    ScheduleConfig,
    TrainConfig,
    WandbConfig,
)
from foreroute.engine.data.corpus import prepare
from foreroute.engine.errors import RunFailed, UserError
from foreroute.engine.metrics.writer import Metrics
from foreroute.engine.model.build import build_model, build_routers
from foreroute.engine.parallel.cpu_group import GlooGroup
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.parallel.world import World
from foreroute.engine.testing.ranks import run_ranks
from foreroute.engine.testing.routers import routers_without_files, with_files
from foreroute.engine.train.step import StepsUnderWay
from foreroute.engine.train.trainer import Trainer


class Silent:
    def __init__(self):
        self.notes = []

    def note(self, line):
        self.notes.append(line)

    def step(self, step):
        pass

    def metrics(self, step, values, seconds_left):
        pass


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    generator = torch.Generator().manual_seed(3)
    words = [b"alpha ", b"beta ", b"gamma(", b"delta)\n", b"epsilon, "]
    picks = torch.randint(0, 5, (6000,), generator=generator).tolist()
    path = tmp_path_factory.mktemp("corpus") / "words.txt"
    path.write_bytes(b"".join(words[i] for i in picks))
    return path


def make_config(text, **sections):
    config = Config(
        corpus=CorpusConfig(Corpus.file, str(text), cache_dir=str(text.parent / "cache")),
        data=DataConfig(streams=4, segment=16),
        model=ModelConfig(layers=2, width=32, heads=2, head_width=16, memory=16, dropout=0.1, attention_dropout=0.1),
        moe=MoEConfig(experts=4, expert_width=32, ngram=2, rows=512),
        schedule=ScheduleConfig(Growth.linear, 1, 4),
        optim=OptimConfig(lr=3e-3, clip=1.0),
        train=TrainConfig(steps=20, log_every=5),
        eval=EvalConfig(k=[1, 4]),
        kernels=KernelsConfig(masked_from_k=4),
    )
    return replace(config, **{name: replace(getattr(config, name), **new) for name, new in sections.items()})


def make_trainer(config, folder):
    corpus = prepare(config.corpus)
    folder.mkdir(parents=True, exist_ok=True)
    moe = with_files(config.moe, corpus, Path(config.corpus.cache_dir), config.num_tables)
    config = replace(config, moe=moe)
    return Trainer(config, corpus, build_routers(config, corpus), folder, Silent())


def train(trainer, stop_asked=lambda: False):
    """Run with metrics in the run's folder, as launch/train.py does."""
    metrics = Metrics(trainer.folder, WandbConfig(), name="test", config_plain={}, resume_step=trainer.step or None)
    with closing(metrics):
        return trainer.run(metrics, stop_asked)


def stop_at(trainer, step):
    return lambda: trainer.step >= step


def saved_steps(trainer):
    return sorted(int(path.name[5:]) for path in trainer.checkpoints.iterdir())


def parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


ROUTERS = {router: {"moe": {"router": router}} for router in routers_without_files()}
ROUTERS["adamoe"]["moe"]["null_experts"] = 2
ROUTERS["moe_plus_plus"]["moe"] |= {"constant_experts": 1, "copy_experts": 1, "null_experts": 1}
ROUTERS["base"] |= {"schedule": {"k_min": 1, "k_max": 1}, "eval": {"k": [1]}}
VARIANTS = {
    **ROUTERS,
    "shuffled": {"moe": {"keys": Keys.shuffled}},
    "stochastic, accumulation": {"moe": {"router": "stochastic"}, "train": {"accumulation": 2}},
    "n-grams": {"moe": {"router": "dense"}, "model": {"ngram": 2, "ngram_rows": 300}},
    "n-gram tables": {"ngram_tables": {"rows": 60, "width": 8}},
    "n-gram tables on the host": {"ngram_tables": {"rows": 60, "width": 8, "place": "host"}},
    "signatures": {"moe": {"router": "dense"}, "model": {"signatures": True}},
    "gate": {"moe": {"weights": RouteWeights.live, "gate": Gate.sqrt_softplus}},
    "experts without rows": {"moe": {"constant_experts": 1, "copy_experts": 1, "null_experts": 1}},
    "residual": {"moe": {"shared_width": 16, "residual": True}},
    "one expert layer": {"moe": {"layers": 1, "plain_width": 20}},
    "shared": {"moe": {"shared_width": 16, "share_table": True}},
    "accumulation": {"train": {"accumulation": 2}},
    "bf16": {"train": {"precision": Precision.bf16}},
    "recompute": {"train": {"recompute": True}},
    "documents": {"corpus": {"document_end": 10}, "data": {"reset_memory": True}},
    "pre_norm": {"model": {"pre_norm": True}},
}


@pytest.mark.parametrize(
    "change",
    [pytest.param(change, id=name, marks=[pytest.mark.slow] * (name == "bf16")) for name, change in VARIANTS.items()],
)
def test_resume_is_bit_identical_to_never_stopping(tmp_path, text, change):
    config = make_config(text, **{**change, "train": {"steps": 10, **change.get("train", {})}})
    whole = make_trainer(config, tmp_path / "whole")
    assert train(whole)
    first = make_trainer(config, tmp_path / "parts")
    assert not train(first, stop_at(first, 5))
    assert first.step == 5
    torch.manual_seed(999)  # whatever ran in between
    second = make_trainer(config, tmp_path / "parts")
    second.resume()
    assert second.step == 5
    train(second)
    want, got = parameters(whole), parameters(second)
    assert all(torch.equal(want[name], got[name]) for name in want)
    for one, other in zip(whole.memory, second.memory, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert losses(tmp_path / "whole")[-2:] == losses(tmp_path / "parts")[-2:]


def test_a_text_without_documents_has_nothing_to_reset_memory_at(tmp_path, text):
    with pytest.raises(UserError, match=r"data.reset_memory=true: needs a text whose documents are known"):
        make_trainer(make_config(text, data={"reset_memory": True}), tmp_path)


OTHER_LAYOUT = {
    "dropout": ({}, "dropout draws new numbers"),
    "shuffled": (
        {"moe": {"keys": Keys.shuffled}, "model": {"dropout": 0.0, "attention_dropout": 0.0}},
        "keys are shuffled among other tokens",
    ),
    "learned": (
        {"moe": {"router": "learned"}, "model": {"dropout": 0.0, "attention_dropout": 0.0}},
        "the balance loss counts other tokens",
    ),
    "none": ({"model": {"dropout": 0.0, "attention_dropout": 0.0}}, None),
}


@pytest.mark.parametrize(("change", "words"), OTHER_LAYOUT.values(), ids=OTHER_LAYOUT.keys())
def test_what_another_layout_changes_is_said(tmp_path, text, change, words):
    """Two micro-batches instead of one: of an arm of which nothing but the rounding depends on it nothing is said."""
    config = make_config(text, **change)
    train(make_trainer(config, tmp_path), lambda: True)
    for accumulation in (1, 2):
        changed = replace(config, train=replace(config.train, accumulation=accumulation))
        resumed = make_trainer(changed, tmp_path)
        resumed.resume()
        said = [line for line in resumed.reporter.notes if "another layout" in line]
        assert said == (
            []
            if accumulation == 1 or words is None
            else [f"the checkpoint is of another layout of ranks and micro-batches: {words}"]
        )


def test_no_step_of_a_stopped_run_is_missing_from_the_lines(tmp_path, text):
    config = make_config(text, train={"steps": 10, "log_every": 5})
    train(make_trainer(config, tmp_path / "whole"))
    first = make_trainer(config, tmp_path / "parts")
    train(first, stop_at(first, 7))
    second = make_trainer(config, tmp_path / "parts")
    second.resume()
    train(second)
    rows = [json.loads(line) for line in (tmp_path / "parts/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [5, 7, 10]
    assert [row["bpc"] for row in rows] == pytest.approx([row["loss"] / 0.6931471805599453 for row in rows])
    together = (2 * rows[1]["loss"] + 3 * rows[2]["loss"]) / 5
    assert [rows[0]["loss"], pytest.approx(together)] == losses(tmp_path / "whole")


def test_a_validation_that_a_stop_cut_short_is_made_up_for(tmp_path, text):
    config = make_config(text, train={"valid_every": 10, "valid_symbols": 200})
    whole = make_trainer(config, tmp_path / "whole")
    train(whole)
    for step in (10, 20):  # also behind the last step
        folder = tmp_path / str(step)
        first = make_trainer(config, folder)
        train(first, stop_at(first, step))
        assert step not in validations(folder)
        second = make_trainer(config, folder)
        second.resume()
        train(second)
        assert validations(folder) == validations(tmp_path / "whole")
    third = make_trainer(config, tmp_path / "20")  # nothing is missing: nothing is done twice
    third.resume()
    train(third)
    assert len((tmp_path / "20/metrics.jsonl").read_text().splitlines()) == len(
        (tmp_path / "whole/metrics.jsonl").read_text().splitlines()
    )


def validations(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["valid_bpc"] for row in rows if "valid_bpc" in row}


def test_a_validation_takes_as_much_text_as_it_is_told(tmp_path, text):
    found = {}
    for symbols in (0, 200, 100_000):
        config = make_config(text, train={"steps": 10, "valid_every": 10, "valid_symbols": symbols})
        train(make_trainer(config, tmp_path / str(symbols)))
        found[symbols] = validations(tmp_path / str(symbols))
    assert found[0] == found[100_000] != found[200]


def test_the_resume_test_sees_what_it_should(tmp_path, text):
    """Negative control: without the restored random numbers or memory the run goes on differently."""
    config = make_config(text)
    whole = make_trainer(config, tmp_path / "whole")
    train(whole)
    for lost in ("rng", "memory"):
        folder = tmp_path / lost
        first = make_trainer(config, folder)
        train(first, stop_at(first, 10))
        second = make_trainer(config, folder)
        second.resume()
        if lost == "rng":
            torch.manual_seed(999)
        else:
            second.memory = [None]
        train(second)
        want, got = parameters(whole), parameters(second)
        assert not all(torch.equal(want[name], got[name]) for name in want), lost


def test_it_learns_and_repeats(tmp_path, text):
    config = make_config(text, train={"steps": 150}, model={"dropout": 0.0, "attention_dropout": 0.0})
    runs = []
    for name in ("a", "b"):
        train(make_trainer(config, tmp_path / name))
        runs.append(losses(tmp_path / name))
    assert runs[0] == runs[1]
    assert runs[0][0] > 3.0 and runs[0][-1] < 1.0  # words of 5 known kinds: log(5)/6 nats is the floor


@pytest.mark.parametrize("router", ["fresh", "stochastic"])
def test_routers_that_draw_learn(tmp_path, text, router):
    """20 steps; the second half of THOR's loss is in auxiliary_loss and the other pass."""
    trainer = make_trainer(make_config(text, moe={"router": router}, model={"dropout": 0.0}), tmp_path)
    train(trainer)
    found = losses(tmp_path)
    assert found[-1] < found[0] - 0.3 and found == sorted(found, reverse=True)


def test_accumulation_equals_one_batch(tmp_path, text):
    quiet = {"dropout": 0.0, "attention_dropout": 0.0}
    one = make_trainer(make_config(text, model=quiet), tmp_path / "one")
    two = make_trainer(make_config(text, model=quiet, train={"accumulation": 2}), tmp_path / "two")
    train(one)
    train(two)
    for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_frozen_router_is_never_updated(tmp_path, text):
    trainer = make_trainer(make_config(text, moe={"router": "frozen"}), tmp_path)
    before = {name: b.clone() for name, b in trainer.model.named_buffers()}
    assert any("gate_weight" in name for name in before)
    train(trainer)
    assert all(torch.equal(before[name], b) for name, b in trainer.model.named_buffers())


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, text):
    config = make_config(text, train={"save_every": 5})
    trainer = make_trainer(config, tmp_path)
    original = trainer.engine.forward

    def forward(*args):
        output = original(*args)
        return output._replace(nll_BQ=output.nll_BQ * math.nan) if trainer.step == 7 else output

    trainer.engine.forward = forward
    with pytest.raises(RunFailed, match=r"loss is nan at step 7; the last good checkpoint is .*step-00000005"):
        train(trainer)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_change(tmp_path, text, stage):
    config = make_config(text, train={"save_every": 5, "zero_stage": stage})
    trainer = make_trainer(config, tmp_path / "nan")
    original = trainer.engine.backward

    def backward(loss):
        original(loss * math.nan if trainer.step == 7 else loss)

    trainer.engine.backward = backward
    with pytest.raises(RunFailed, match=r"gradient norm is \S+ at step 7; the last good checkpoint is .*step-00000005"):
        train(trainer)
    healthy = make_trainer(config, tmp_path / "healthy")
    train(healthy, stop_at(healthy, 7))
    want, got = (dict(t.engine.read_state()) for t in (healthy, trainer))
    assert all(torch.equal(want[name]["weight"], got[name]["weight"]) for name in want)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, text):
    config = make_config(text, train={"save_every": 5})
    train(make_trainer(config, tmp_path))
    newest, _ = checkpoint.find_newest(tmp_path / "checkpoints")
    shard = next(newest.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    again = make_trainer(config, tmp_path)
    again.resume()
    assert again.step == 15
    assert any("step-00000020" in note for note in again.reporter.notes)


@pytest.mark.parametrize(("minutes", "steps"), [(0.0, [4]), (10.0, [1, 4]), (0.01, [1, 2, 3, 4])])
def test_checkpoints_by_time(text, tmp_path, monkeypatch, minutes, steps):
    """By a clock that shows eleven minutes at the first look, and a second more at each other one."""
    config = make_config(text, train={"steps": 4, "keep": 9, "save_minutes": minutes})
    trainer = make_trainer(config, tmp_path / "run")
    ticks = itertools.count(660.0)
    clock = SimpleNamespace(monotonic=lambda: next(ticks), perf_counter=time.perf_counter)
    monkeypatch.setattr(foreroute.engine.train.trainer, "time", clock)
    trainer._saved_at = 0.0
    assert train(trainer)
    assert saved_steps(trainer) == steps


@pytest.fixture
def behind(monkeypatch):
    """Steps are read one step later, as on a GPU."""
    monkeypatch.setattr(foreroute.engine.train.trainer, "StepsUnderWay", lambda on_gpu: StepsUnderWay(on_gpu=True))


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_steps_read_later_are_the_same_steps(tmp_path, text, behind, monkeypatch):
    """In lines of five steps, the last of them short: all that does not tell a time, and the model."""
    config = make_config(text, train={"steps": 13, "valid_every": 4, "save_every": 6, "keep": 9})
    later = make_trainer(config, tmp_path / "later")
    train(later)
    monkeypatch.undo()
    at_once = make_trainer(config, tmp_path / "at once")
    train(at_once)
    want, got = lines(tmp_path / "at once"), lines(tmp_path / "later")
    assert [line["step"] for line in got] == [4, 5, 8, 10, 12, 13]
    timed = ("_ms", "memory_bytes", "per_second", "mfu", "slowest_rank", "rank_skew")
    for a, b in zip(want, got, strict=True):
        assert a.keys() == b.keys()
        assert [name for name in a if a[name] != b[name] and not any(part in name for part in timed)] == []
    assert all(torch.equal(b, parameters(at_once)[name]) for name, b in parameters(later).items())
    assert saved_steps(later) == saved_steps(at_once) == [6, 12, 13]


def test_a_step_read_later_has_its_times_in_a_line_once(tmp_path, text, behind):
    trainer = make_trainer(make_config(text), tmp_path)
    told = []
    tell = trainer.meter.tell
    trainer.meter.tell = lambda times: (told.append(times), tell(times))
    train(trainer)
    assert len(told) == 20
    for number, line in enumerate(lines(tmp_path)):
        steps = told[5 * number : 5 * number + 5]
        assert line["forward_ms"] == pytest.approx(sum(times.forward_ms for times in steps) / 5)
        assert 0 < line["rank_own_ms"][0] <= max(times.own_ms for times in told)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_step_read_later_that_is_not_finite(tmp_path, text, behind, bad):
    """The line names the right step, it has changed nothing, and no checkpoint is written behind it."""
    config = make_config(text, train={"save_every": 8})
    trainer = make_trainer(config, tmp_path)
    forward, backward, step = trainer.engine.forward, trainer.engine.backward, trainer.engine.step
    updated, launched = [], []

    def bad_forward(*args):
        launched.append(trainer.step)
        output = forward(*args)
        return output._replace(nll_BQ=output.nll_BQ * math.nan) if bad == "loss" and trainer.step == 15 else output

    trainer.engine.forward = bad_forward
    trainer.engine.backward = lambda loss: backward(
        loss * math.nan if bad == "gradient" and trainer.step == 15 else loss
    )
    trainer.engine.step = lambda **options: updated.append(step(**options))
    trainer.config.train.log_every = 100
    what = "loss is nan" if bad == "loss" else "gradient norm is inf"
    with pytest.raises(RunFailed, match=rf"{what} at step 15; the last good checkpoint is .*step-00000008"):
        train(trainer)
    assert trainer.step == 15 and saved_steps(trainer) == [8]
    assert launched == list(range(16))  # a checkpoint is due behind step 15: it is read first
    assert [bool(applied) for applied in updated] == [True] * 15 + [False]


def test_tables_in_host_memory_train_as_on_the_device(tmp_path, text):
    """With micro-batches, validations and a checkpoint between the steps: equal losses, and equal rows on disk."""
    found = {}
    for place in ("device", "host"):
        tables = {"rows": 60, "width": 8, "place": place}
        config = make_config(
            text,
            ngram_tables=tables,
            data={"prefetch": 3},
            train={"steps": 12, "log_every": 1, "accumulation": 2, "valid_every": 5, "save_every": 7},
        )
        trainer = make_trainer(config, tmp_path / place)
        assert train(trainer)
        lines = [json.loads(line) for line in (tmp_path / place / "metrics.jsonl").read_text().splitlines()]
        shards = [load_file(path / "shard-00000.safetensors") for path in sorted(trainer.checkpoints.iterdir())]
        rows = [{key: value for key, value in shard.items() if key.startswith("ngram_rows")} for shard in shards]
        found[place] = [(line.get("loss"), line.get("valid_loss")) for line in lines], rows
        loaded = build_model(config, trainer.corpus.vocab.size)
        checkpoint.load_weights(checkpoint.find_newest(trainer.checkpoints)[0], loaded)
        here, there = (model.ngram_tables.tables[0].store.state["value"] for model in (loaded, trainer.model))
        assert torch.equal(here, there)  # an evaluation has all rows, also without DeepSpeed
    (losses_there, rows_there), (losses_here, rows_here) = found["device"], found["host"]
    assert losses_here == losses_there and len(losses_here) == 14
    assert len(rows_here) == 2 and all(len(rows) == 4 for rows in rows_here)
    for here, there in zip(rows_here, rows_there, strict=True):
        assert here.keys() == there.keys() and all(torch.equal(here[key], there[key]) for key in here)


def stopped_by_one(rank, ranks, config, folder):
    """Steps at which a rank stops, and its checkpoints: rank 1 asks for it in the sixth step."""
    found = []
    for later in (False, True):
        foreroute.engine.train.trainer.StepsUnderWay = partial(pretended, later)
        cpu_group, planning = GlooGroup(dist.group.WORLD), GlooGroup(dist.new_group())
        world = World(Mesh(rank, ranks, ranks), cpu_group=cpu_group, planning=planning)
        corpus = prepare(config.corpus)
        routers = build_routers(config, corpus, world.mesh)
        trainer = Trainer(config, corpus, routers, folder / str(later), Silent(), world)
        assert not trainer.run(None, lambda: rank == 1 and trainer.step >= 5)  # noqa: B023
        found.append((trainer.step, saved_steps(trainer)))
    return found


def pretended(later, *, on_gpu):
    return StepsUnderWay(on_gpu=on_gpu or later)


@pytest.mark.dist
def test_a_stop_of_one_rank_that_is_read_later_is_one_step_later_on_all(tmp_path, text):
    config = make_config(text, train={"log_every": 100})
    prepare(config.corpus)
    for answer in run_ranks(stopped_by_one, 2, 2, config, tmp_path):
        assert answer == [(6, [6]), (7, [7])]
