"""What a study runs: a preset's arms, seeds and learning rates become jobs, in an order that is good when it is cut short.

A job is one run of launch.train. All of one seed read the same symbols in the same order: the seed sets the weights' start,
dropout, a hashed router's tables, and where in their text the streams begin (data.start). Nothing is run here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.config import Config, CorpusConfig, Router, Split, require, to_plain
from launch.cli import CONF, compose_run, quoted, read_options

TUNING_SEED = 0
_GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, are spread evenly however many there are
_OF_MACHINE = (
    "corpus.path", "corpus.cache_dir", "train.name", "train.runs_dir", "train.resume", "train.threads", "train.keep",
    "train.save_every", "train.log_every", "data.prefetch", "wandb.mode", "wandb.project", "wandb.group",
    "kernels.masked_from_k",
)  # fmt: skip


@dataclass
class ArmConfig:
    """One arm of a study."""

    experiment: str | None = None
    """Of conf/experiment; None means study/ and the arm's name."""
    options: list[str] = field(default_factory=list)
    """Options of launch.train beside it, such as moe.spread=4."""
    kin: str = "hashed"
    """The arm whose tuned learning rate this one takes."""
    core: bool = True
    """Core arms run first, with all their seeds."""


@dataclass
class Preset:
    """A study: conf/study/NAME.yaml."""

    arms: dict[str, ArmConfig]
    """In the order in which they run; the first is what the others are compared with."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    options: list[str] = field(default_factory=list)
    """Options of launch.train for all arms, such as train.steps=3000."""
    learning_rates: list[float] = field(default_factory=list)
    """Rates that every kin arm is tried with; the best on the valid split is taken. Empty: each experiment's own."""
    tuning_steps: int | None = None
    """Steps of a run that tries a rate; None means as many as the study's."""
    k: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    """Numbers of active experts that the test split is evaluated at, and an arm's own largest k in training."""
    points: int = 12
    """Validations over training, equally far apart."""
    valid_symbols: int = 50_000
    """Symbols of a validation; 0 for the whole split."""
    checkpoints: int = 4
    """Checkpoints over training: a run that is killed goes on from the last one."""
    kept: int | None = None
    """Newest checkpoints that are kept until the run is analysed; changes of routes are measured between them. None: all."""
    analysed_symbols: int = 4096
    """Text on which experts and routes are compared (launch.analyse)."""
    pairs: list[list[str]] = field(default_factory=list)
    """Pairs of arms, [a, b], whose difference a - b is reported beside that of every arm to the first."""

    def __post_init__(self) -> None:
        require(len(self.arms) > 0, "arms: a study needs at least one")
        require(len(self.seeds) == len(set(self.seeds)) > 0, f"seeds={self.seeds}: needs different seeds")  # fmt: skip
        require(TUNING_SEED not in self.seeds, f"seeds={self.seeds}: {TUNING_SEED} is the seed of the learning rate's runs")  # fmt: skip
        require(self.points >= 1 and self.checkpoints >= 1, "points and checkpoints: must be at least 1")  # fmt: skip
        for name, arm in self.arms.items():
            require(arm.kin in self.arms or not self.learning_rates, f"arms.{name}.kin={arm.kin}: must be one of {', '.join(self.arms)}")  # fmt: skip
        for pair in self.pairs:
            require(len(pair) == 2, f"pairs={pair}: must be two arms")

    @property
    def kin(self) -> list[str]:
        """Arms whose learning rate is tuned."""
        return list(dict.fromkeys(arm.kin for arm in self.arms.values()))


@dataclass(frozen=True, slots=True)
class Job:
    """One run."""

    name: str  # of its run folder and its result file
    arm: str
    seed: int
    config: Config  # as launch.train composes it; without the learning rate, unless it tries one
    options: tuple[str, ...]  # that launch.train is given, likewise
    tries: float | None = None  # the learning rate that this run tries

    @property
    def analysed(self) -> bool:
        """The run has experts to look at."""
        return self.tries is None and self.config.moe.router is not Router.dense


def read_preset(name: str) -> Preset:
    """Read conf/study/NAME.yaml, or the file of that name if it ends in .yaml.

    Raises:
        UserError: there is no such preset, or it is wrong.
    """
    if name.endswith(".yaml"):
        return read_options(Path(name), Preset)
    known = sorted(path.stem for path in (CONF / "study").glob("*.yaml"))
    require(name in known, f"preset={name}: must be one of {', '.join(known)}, or a file that ends in .yaml")  # fmt: skip
    return read_options(CONF / "study" / f"{name}.yaml", Preset)


def plan_jobs(preset: Preset, corpus: CorpusConfig, out: Path) -> list[Job]:
    """List all runs of a study, those that try learning rates first.

    Raises:
        UserError or an error of Hydra's: an arm's experiment or option is wrong, or its steps cannot be divided.
    """
    return [*_tuning_jobs(preset, corpus, out), *_arm_jobs(preset, corpus, out)]


def _tuning_jobs(preset: Preset, corpus: CorpusConfig, out: Path) -> Iterator[Job]:
    """Rate by rate, so that noise of the machine is shared between the arms."""
    for rate in preset.learning_rates:
        for arm in preset.kin:
            name = f"tune-{arm}-lr{rate:g}"
            options = _options(preset, corpus, out, arm=arm, seed=TUNING_SEED, name=name)
            options.append(f"optim.lr={rate}")
            if preset.tuning_steps is not None:
                options.append(f"train.steps={preset.tuning_steps}")
            config = compose_run(options)
            options += [*_spread(preset, config), "eval.split=valid", f"eval.k=[{config.schedule.k_max}]"]  # fmt: skip
            yield Job(name, arm, TUNING_SEED, compose_run(options), tuple(options), rate)


def _arm_jobs(preset: Preset, corpus: CorpusConfig, out: Path) -> Iterator[Job]:
    """Core arms, seed by seed, then the others likewise; every other seed in reverse, so that no arm is always early."""
    for core in (True, False):
        arms = [name for name, arm in preset.arms.items() if arm.core is core]
        for number, seed in enumerate(preset.seeds):
            for arm in arms if number % 2 == 0 else reversed(arms):
                name = f"{arm}-seed{seed}"
                options = _options(preset, corpus, out, arm=arm, seed=seed, name=name)
                config = compose_run(options)
                ks = sorted({*preset.k, config.schedule.k_max})
                options += [*_spread(preset, config), f"eval.split={Split.test.name}", f"eval.k={ks}".replace(" ", "")]  # fmt: skip
                yield Job(name, arm, seed, compose_run(options), tuple(options))


def _options(
    preset: Preset, corpus: CorpusConfig, out: Path, *, arm: str, seed: int, name: str
) -> list[str]:
    """What launch.train is given, but for the learning rate and what depends on the number of steps."""
    chosen = preset.arms[arm]
    text = [f"corpus={corpus.name.name}", f"corpus.tokens={corpus.tokens.name}", f"corpus.cache_dir={quoted(corpus.cache_dir)}"]  # fmt: skip
    if corpus.path:
        text.append(f"corpus.path={quoted(corpus.path)}")
    return [
        f"experiment={chosen.experiment or f'study/{arm}'}",
        *text,
        *preset.options,
        *chosen.options,
        f"train.seed={seed}",
        f"data.start={seed * _GOLDEN % 1:.6f}",
        f"train.name={name}",
        f"train.runs_dir={quoted(str(out / 'runs'))}",
        f"train.valid_symbols={preset.valid_symbols}",
        "train.threads=1",
        "train.resume=true",
    ]


def _spread(preset: Preset, config: Config) -> list[str]:
    """Validations and checkpoints over the run's steps; both come at its end."""
    steps = config.train.steps
    require(
        steps % preset.points == 0,
        f"points={preset.points}: must divide train.steps={steps} of {config.train.name}",
    )
    return [
        f"train.valid_every={steps // preset.points}",
        f"train.save_every={-(-steps // preset.checkpoints)}",
        f"train.keep={preset.kept or preset.checkpoints + 1}",
    ]


def with_rate(job: Job, rate: float | None) -> tuple[Config, list[str]]:
    """Give a job's configuration and options with a learning rate put in; None leaves the experiment's own."""
    if rate is None:
        return job.config, list(job.options)
    config = replace(job.config, optim=replace(job.config.optim, lr=rate))
    return config, [*job.options, f"optim.lr={rate}"]


def chosen_options(config: Config) -> dict[str, Any]:
    """Give the options that are not the default's, without those that say where and how the same steps are computed."""
    defaults = to_plain(Config())
    return {
        f"{section}.{name}": value
        for section, options in to_plain(config).items()
        for name, value in options.items()
        if value != defaults[section][name] and f"{section}.{name}" not in _OF_MACHINE
    }


def difference(config: Config, chosen: Mapping[str, Any]) -> str | None:
    """Name the first option in which a configuration is not what `chosen_options` gave earlier; None if there is none."""
    now = chosen_options(config)
    for name in [*now, *chosen]:
        if now.get(name) != chosen.get(name):
            return f"{name} was {chosen.get(name, 'the default')}, now it is {now.get(name, 'the default')}"  # fmt: skip
    return None
