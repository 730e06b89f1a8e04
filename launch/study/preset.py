"""Make the jobs of a study from a preset's arms, seeds and learning rates, in an order that serves a study that is cut
short.

A job is one run of launch.train. All jobs of one seed read the same symbols in the same order. The seed sets the
initial weights, dropout, a hashed router's tables, and the place in the text where the streams begin (data.start).
Nothing is run here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from foreroute.engine.config import Config, CorpusConfig, Split, to_plain
from foreroute.engine.config.option import by_full_name
from foreroute.engine.errors import require
from foreroute.launch.runs.folder import OF_MACHINE
from foreroute.launch.start.arguments import quote
from foreroute.launch.start.config_files import compose_run, read_options
from foreroute.launch.start.help import CONF

TUNING_SEED = 0
_GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, are spread evenly however many there are
_STOPS = 16  # checkpoints beyond the preset's own that are kept, so that what stops leave pushes none of those out


@dataclass
class ArmConfig:
    """One arm of a study."""

    experiment: str | None = None
    """Of conf/experiment; None means study/ and the arm's name."""
    options: list[str] = field(default_factory=list)
    """Options of launch.train beside it, such as moe.spread=4."""
    kin: str = "hashed"
    """The arm whose tuned learning rate this one takes."""
    same_time_as: str | None = None
    """An arm that tries rates, too: this one's steps take as long as all of its steps, by the seconds per step of those
    runs."""
    core: bool = True
    """Core arms run first, with all their seeds."""
    seeds: list[int] = field(default_factory=list)
    """Of this arm; empty: the study's."""


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
    """Newest checkpoints that are kept until the run is analysed; changes of routes are measured between them. None:
    all."""
    analysed_symbols: int = 4096
    """Text on which experts and routes are compared (launch.analyse)."""
    pairs: list[list[str]] = field(default_factory=list)
    """Pairs of arms, [a, b], whose difference a - b is reported beside that of every arm to the first."""
    lead: dict[str, str] = field(default_factory=dict)
    """Arms of the chart that the page begins with, and what they are called there; empty: all, where these are few."""
    limits: list[str] = field(default_factory=list)
    """Statements for the page's section of limits."""

    def __post_init__(self) -> None:
        require(len(self.arms) > 0, "arms: a study needs at least one")
        require(len(self.seeds) > 0, f"seeds={self.seeds}: needs different seeds")
        own = {f"arms.{name}.seeds": arm.seeds for name, arm in self.arms.items()}
        for option, seeds in ({"seeds": self.seeds} | own).items():
            require(len(seeds) == len(set(seeds)), f"{option}={seeds}: needs different seeds")
            tuning = f"{TUNING_SEED} is the seed of the learning rate's runs"
            require(TUNING_SEED not in seeds, f"{option}={seeds}: {tuning}")
        require(self.points >= 1 and self.checkpoints >= 1, "points and checkpoints: must be at least 1")
        for name, arm in self.arms.items():
            require(
                arm.kin in self.arms or not self.learning_rates,
                f"arms.{name}.kin={arm.kin}: must be one of {', '.join(self.arms)}",
            )
            as_long = arm.same_time_as
            require(
                as_long is None or (bool(self.learning_rates) and as_long in self.kin),
                f"arms.{name}.same_time_as={as_long}: must be one of the arms that try learning_rates:"
                f" {', '.join(self.kin) if self.learning_rates else 'none does'}",
            )
        for pair in self.pairs:
            require(len(pair) == 2, f"pairs={pair}: must be two arms")

    def seeds_of(self, arm: str) -> list[int]:
        """Return the seeds that an arm runs with."""
        return self.arms[arm].seeds or self.seeds

    @property
    def runs(self) -> list[tuple[str, int]]:
        """The arm and seed of each run, but for those that try rates."""
        return [(arm, seed) for arm in self.arms for seed in self.seeds_of(arm)]

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
    def chosen_options(self) -> dict[str, Any]:
        """Options that are not the default's, but for those of where and how the same steps are computed."""
        defaults, own = by_full_name(to_plain(Config())), by_full_name(to_plain(self.config))
        return {name: value for name, value in own.items() if value != defaults[name] and name not in OF_MACHINE}

    @property
    def analysed(self) -> bool:
        """Whether the run has experts that can be analysed."""
        return self.tries is None and not self.config.moe.dense


def read_preset(name: str) -> Preset:
    """Read conf/study/NAME.yaml, or the file of that name if it ends in .yaml.

    Raises:
        UserError: there is no such preset, or it is wrong.
    """
    if name.endswith(".yaml"):
        return read_options(Path(name), Preset)
    known = sorted(path.stem for path in (CONF / "study").glob("*.yaml"))
    require(name in known, f"preset={name}: must be one of {', '.join(known)}, or a file that ends in .yaml")
    return read_options(CONF / "study" / f"{name}.yaml", Preset)


def plan_jobs(preset: Preset, corpus: CorpusConfig, out: Path) -> list[Job]:
    """List all runs of a study, those that try learning rates first.

    Raises:
        UserError or an error of Hydra's: an arm's experiment or option is wrong, or its steps cannot be divided.
    """
    started = {arm: _start_of(preset, corpus, out, arm) for arm in preset.arms}
    return [*_tuning_jobs(preset, started), *_arm_jobs(preset, started)]


def _start_of(preset: Preset, corpus: CorpusConfig, out: Path, arm: str) -> Job:
    """Compose the configuration that all runs of an arm share; Hydra composes it once."""
    chosen = preset.arms[arm]
    options = [
        f"experiment={chosen.experiment or f'study/{arm}'}",
        f"corpus={corpus.name.name}",
        *preset.options,
        *chosen.options,
    ]
    path = [] if corpus.path is None else [f"corpus.path={quote(corpus.path)}"]  # composing needs it
    job = Job(arm, arm, TUNING_SEED, compose_run([*options, *path]), tuple(options))
    return with_changes(
        job,
        {
            **{f"corpus.{name}": getattr(corpus, name) for name in ("path", "tokens", "cache_dir")},
            "train.runs_dir": str(out / "runs"),
            "train.valid_symbols": preset.valid_symbols,
            "train.threads": 1,
            "train.resume": True,
        },
    )


def _tuning_jobs(preset: Preset, started: Mapping[str, Job]) -> Iterator[Job]:
    """List the runs that try rates, rate by rate, so that noise of the machine is shared between the arms."""
    for rate in preset.learning_rates:
        for arm in preset.kin:
            job = replace(started[arm], name=f"tune-{arm}-lr{rate:g}", tries=rate)
            steps = preset.tuning_steps or job.config.train.steps
            changes = {
                "optim.lr": rate,
                "train.steps": steps,
                "eval.split": Split.valid,
                "eval.k": [job.config.schedule.k_max],
            }
            common = _common(preset, job.name, TUNING_SEED, steps)
            yield with_changes(job, {**changes, **common, "train.valid_every": 0})


def _arm_jobs(preset: Preset, started: Mapping[str, Job]) -> Iterator[Job]:
    """List core arms, seed by seed, then the others likewise; every other seed in reverse, so that no arm is always
    early."""
    for core in (True, False):
        for number, seed in enumerate(dict.fromkeys([*preset.seeds, *(seed for _, seed in preset.runs)])):
            arms = [arm for arm in preset.arms if preset.arms[arm].core is core and seed in preset.seeds_of(arm)]
            for arm in arms if number % 2 == 0 else reversed(arms):
                job = replace(started[arm], name=f"{arm}-seed{seed}", seed=seed)
                ks = sorted({*preset.k, job.config.schedule.k_max})
                changes = {"eval.split": Split.test, "eval.k": ks}
                yield with_changes(job, {**changes, **_common(preset, job.name, seed, job.config.train.steps)})


def _common(preset: Preset, name: str, seed: int, steps: int) -> dict[str, Any]:
    """Return a run's options: its name, its seed, and its validations and checkpoints over the steps and at the end."""
    require(steps % preset.points == 0, f"points={preset.points}: must divide train.steps={steps} of {name}")
    return {
        "train.name": name,
        "train.seed": seed,
        "data.start": round(seed * _GOLDEN % 1, 6),
        "train.valid_every": steps // preset.points,
        "train.save_every": -(-steps // preset.checkpoints),
        "train.save_minutes": 0.0,  # only those that are compared, which would push each other out
        "train.keep": preset.kept or preset.checkpoints + _STOPS,
    }


def with_steps(preset: Preset, job: Job, steps: int) -> Job:
    """Return an arm's job with another number of steps."""
    return with_changes(job, {"train.steps": steps, **_common(preset, job.name, job.seed, steps)})


def with_changes(job: Job, changes: Mapping[str, Any]) -> Job:
    """Return a job with other options, by their full names, in its configuration and on its command line."""
    sections: dict[str, dict[str, Any]] = {}
    for full, value in changes.items():
        section, name = full.split(".")
        sections.setdefault(section, {})[name] = value
    replaced = {name: replace(getattr(job.config, name), **options) for name, options in sections.items()}
    options = [f"{name}={_written(value)}" for name, value in changes.items()]
    return replace(job, config=replace(job.config, **replaced), options=(*job.options, *options))


def _written(value: Any) -> str:
    """Write a value as Hydra reads it."""
    if isinstance(value, str):
        return quote(value)
    if isinstance(value, Enum):
        return value.name
    return "null" if value is None else str(value).replace(" ", "")


def with_rate(job: Job, rate: float | None) -> Job:
    """Set a learning rate; None keeps the experiment's own."""
    return job if rate is None else with_changes(job, {"optim.lr": rate})


def difference(now: Mapping[str, Any], chosen: Mapping[str, Any]) -> str | None:
    """Return the first option of a job's chosen ones that is not what it was, in words; None if there is none."""
    for name in [*now, *chosen]:
        if now.get(name) != chosen.get(name):
            return f"{name} was {chosen.get(name, 'the default')}, now it is {now.get(name, 'the default')}"
    return None
