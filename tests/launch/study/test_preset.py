"""Which runs a preset makes, in which order, with which options; and what is refused before anything runs."""

from dataclasses import replace

import hydra
import pytest
import yaml
from hydra.core.config_store import ConfigStore

from foreroute.engine.config import Corpus, CorpusConfig
from foreroute.engine.errors import UserError
from foreroute.engine.model.build import build_model
from foreroute.launch.start.cli import CONF
from foreroute.launch.start.config_files import compose_run
from foreroute.launch.study.preset import difference, plan_jobs, read_preset, with_rate
from foreroute.launch.study.program import StudyArgs

FILE = CorpusConfig(Corpus.file, path="x")
TINY = {
    "arms": {
        "dense": {"experiment": "debug", "options": ["moe.router=dense"], "kin": "dense"},
        "hashed": {"experiment": "debug", "options": ["moe.spread=1"]},
        "more": {"experiment": "debug", "core": False},
    },
    "seeds": [1, 2],
    "options": ["train.steps=24", "schedule.k_max=3"],
    "learning_rates": [0.001, 0.004],
    "tuning_steps": 8,
    "points": 4,
    "checkpoints": 5,
    "k": [1, 4],
}


@pytest.fixture
def composing():
    """As inside of launch.study."""
    ConfigStore.instance().store("schema", StudyArgs)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def plan(tmp_path, **changes):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    corpus = CorpusConfig(Corpus.file, path=str(tmp_path / "a text, with = signs"))
    return plan_jobs(read_preset(str(path)), corpus, tmp_path / "out")


def test_the_order_is_good_when_it_is_cut_short(composing, tmp_path):
    """Rates first, arms side by side; then core arms seed by seed, every other seed in reverse; the others last."""
    assert [job.name for job in plan(tmp_path)] == [
        "tune-dense-lr0.001",
        "tune-hashed-lr0.001",
        "tune-dense-lr0.004",
        "tune-hashed-lr0.004",
        "dense-seed1",
        "hashed-seed1",
        "hashed-seed2",
        "dense-seed2",
        "more-seed1",
        "more-seed2",
    ]
    untuned = [job.name for job in plan(tmp_path, learning_rates=[])]
    assert untuned[:2] == ["dense-seed1", "hashed-seed1"] and len(untuned) == 6


def test_arms_may_have_seeds_of_their_own(composing, tmp_path):
    """More for one arm, after those of all."""
    arms = {**TINY["arms"], "dense": {**TINY["arms"]["dense"], "seeds": [1, 2, 5]}}
    jobs = plan(tmp_path, arms=arms, learning_rates=[])
    assert [job.name for job in jobs] == [
        *("dense-seed1", "hashed-seed1", "hashed-seed2", "dense-seed2", "dense-seed5"),
        *("more-seed1", "more-seed2"),
    ]


def test_what_a_run_is_given(composing, tmp_path):
    jobs = {job.name: job for job in plan(tmp_path)}
    for seed in (1, 2):  # arms of a seed read the same text in the same order
        dense, hashed = jobs[f"dense-seed{seed}"].config, jobs[f"hashed-seed{seed}"].config
        assert dense.data == hashed.data and dense.train.seed == hashed.train.seed == seed
    assert jobs["dense-seed1"].config.data.start != jobs["dense-seed2"].config.data.start
    config = jobs["hashed-seed1"].config
    assert config.corpus.path == str(tmp_path / "a text, with = signs")
    assert config.train.runs_dir == str(tmp_path / "out/runs") and config.train.threads == 1
    assert (config.train.valid_every, config.train.save_every, config.train.keep) == (6, 5, 21)
    assert config.eval.k == [1, 3, 4] and config.eval.split.name == "test"  # its own k_max too
    tuning = jobs["tune-hashed-lr0.004"].config
    assert (tuning.optim.lr, tuning.train.steps, tuning.train.seed) == (0.004, 8, 0)
    assert tuning.eval.k == [3] and tuning.eval.split.name == "valid"
    assert tuning.train.valid_every == 0  # its one figure is that of the end
    assert not jobs["dense-seed1"].analysed and not jobs["tune-hashed-lr0.004"].analysed
    assert jobs["hashed-seed1"].analysed
    rated = with_rate(jobs["more-seed1"], 0.004)
    assert rated.config.optim.lr == 0.004 and rated.options[-1] == "optim.lr=0.004"


def test_the_command_line_says_what_the_configuration_says(composing, tmp_path):
    """Hydra reads the options of a run back as the configuration that the study holds to be the run's."""
    for job in plan(tmp_path)[1:6:3]:
        assert compose_run(list(job.options)) == job.config
        assert compose_run([*job.options, "optim.lr=0.5"]) != job.config


def test_other_options_are_told_apart(composing, tmp_path):
    job, *_ = plan(tmp_path, learning_rates=[])
    written = job.chosen_options
    assert difference(job.chosen_options, written) is None
    assert "train.runs_dir" not in written and "corpus.path" not in written
    other, *_ = plan(tmp_path, learning_rates=[], options=["train.steps=12", "schedule.k_max=3"])
    assert difference(other.chosen_options, written) == "train.steps was 24, now it is 12"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arms": {}}, "arms: a study needs at least one"),
        ({"seeds": [1, 1]}, "seeds=[1, 1]"),
        ({"seeds": [0, 1]}, "seeds=[0, 1]: 0 is the seed"),
        ({"arms": {"hashed": {"seeds": [0]}}}, "arms.hashed.seeds=[0]: 0 is the seed"),
        ({"arms": {"hashed": {"seeds": [2, 3, 2]}}}, "arms.hashed.seeds=[2, 3, 2]: needs different seeds"),
        ({"points": 5}, "points=5: must divide train.steps=8"),
        ({"pairs": [["hashed"]]}, "pairs=['hashed']"),
        ({"arms": {"hashed": {"experiment": "debug", "kin": "dense"}}}, "arms.hashed.kin=dense: must be one of hashed"),
        (
            {"arms": {**TINY["arms"], "long": {"same_time_as": "more"}}},
            "arms.long.same_time_as=more: must be one of the arms that try learning_rates: dense, hashed",
        ),
        (
            {"arms": {**TINY["arms"], "long": {"same_time_as": "dense"}}, "learning_rates": []},
            "arms.long.same_time_as=dense",
        ),
        ({"sedes": [1]}, "Key 'sedes' not in 'Preset'"),
        ({"seeds": ["one"]}, "one"),
    ],
)
def test_a_wrong_preset_is_refused(composing, tmp_path, changes, words):
    with pytest.raises(UserError) as error:
        plan(tmp_path, **changes)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_preset_that_is_not_there_names_those_that_are():
    with pytest.raises(
        UserError,
        match="preset=none_such: must be one of counts_and_weights, overnight, paper, routing, small, tables_share,"
        " tables_share_half",
    ):
        read_preset("none_such")
    with pytest.raises(UserError, match="no such file"):
        read_preset("/none/such.yaml")


PRESETS = {
    "small": "dense",
    "overnight": "dense",
    "paper": "dense",
    "routing": "hashed",
    "counts_and_weights": "hashed",
    "tables_share": "hashed",
    "tables_share_half": "hashed",
}
SLOW = "overnight", "small", "tables_share", "tables_share_half"  # to compose


@pytest.mark.parametrize(("name", "first"), PRESETS.items())
def test_presets_are_whole(name, first):
    preset = read_preset(name)
    assert next(iter(preset.arms)) == first and len(preset.seeds) >= 3
    assert not preset.learning_rates or {"dense", "hashed"} <= set(preset.kin)
    for a, b in preset.pairs:
        assert a in preset.arms and b in preset.arms and a != b


def test_tables_share_takes_parameters_from_experts(composing, tmp_path):
    """All arms have those of `hashed`, but for routers' tables; and half a pass is nothing else."""
    whole, half = read_preset("tables_share"), read_preset("tables_share_half")
    assert half.options == ["train.steps=1820", *whole.options[1:]] and whole.options[0] == "train.steps=3640"
    assert replace(half, options=whole.options) == whole
    jobs = plan_jobs(replace(whole, seeds=[1], learning_rates=[], arms=timeless(whole)), FILE, tmp_path)
    sizes = {}
    for job in jobs:
        model = build_model(job.config, 256)
        rows = 0 if model.ngram_tables is None else model.ngram_tables.num_parameters
        sizes[job.arm] = rows + sum(parameter.numel() for parameter in model.parameters())
    assert sizes.keys() == whole.arms.keys()
    assert all(
        abs(size - sizes["hashed"]) <= 2e-4 * sizes["hashed"] for arm, size in sizes.items() if arm != "dense"
    ), sizes
    assert abs(sizes["dense"] - sizes["hashed"]) <= 4e-3 * sizes["hashed"]  # no biases of 15 experts
    assert build_model(jobs[0].config, 256).ngram_tables is None


def timeless(preset):
    return {name: replace(arm, same_time_as=None) for name, arm in preset.arms.items()}


def test_routing_changes_small_in_nothing_else():
    """So that its runs may be compared with those of small, whose best rate it takes."""
    small, routing = read_preset("small"), read_preset("routing")
    assert routing.options == [*small.options, "optim.lr=4.0e-3"]
    for name in ("seeds", "points", "valid_symbols", "analysed_symbols", "checkpoints"):
        assert getattr(routing, name) == getattr(small, name)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in PRESETS])
def test_presets_compose(composing, tmp_path, name):
    preset = read_preset(name)
    jobs = plan_jobs(preset, FILE, tmp_path)
    assert {job.arm for job in jobs} == set(preset.arms)
