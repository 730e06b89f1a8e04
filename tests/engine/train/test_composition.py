"""Everything that routes, with everything that a run can be made of: each combination trains like the plain run, or is
refused with one line.

A cell is a kind of routing with one value of each factor. Its losses, its experts' rows and its weights after three
steps are those of the plain cell of its kind: one rank, ZeRO 1, no option. The optimizer is linear in the gradient,
which shows every gradient with its scale (Adam as usual would hide it). A resumed cell loads the plain cell's
checkpoint after two steps, so all but the plain layout resume on another one. A certified cell is held to its
certificate.

Kinds are found: a new method in engine/routing/ is in these tests as soon as it has a file in conf/router/. Cells are
made. They cover each pair of values of two factors; all combinations would be tens of thousands. Those of the ordinary
set cover, on one rank and on two, each pair of options, each kind on two ranks that share its experts, and what is
refused; those of the slow set cover the other pairs. Of four ranks, each kind has one group or two of them, by turns.
"""

import random
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache, partial
from itertools import combinations, cycle, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from torch import distributed as dist

from foreroute.engine.certificate.check import Check
from foreroute.engine.certificate.counts.exact import certify
from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.counts.placement import Placement
from foreroute.engine.certificate.record import Record, read
from foreroute.engine.config import (
    Config,
    Corpus,
    CorpusConfig,
    DataConfig,
    EvalConfig,
    ExchangeKind,
    KernelsConfig,
    ModelConfig,
    MoEConfig,
    NgramTablesConfig,
    OptimConfig,
    ParallelConfig,
    Precision,
    ScheduleConfig,
    Split,
    TrainConfig,
    to_plain,
)
from foreroute.engine.config.enums import Decay
from foreroute.engine.config.model import router_names
from foreroute.engine.data.corpus import prepare
from foreroute.engine.errors import RunFailed, UserError
from foreroute.engine.model.build import build_model, build_routers
from foreroute.engine.moe.layer import MoELayer
from foreroute.engine.ngram_tables.row_rules import RowSGD
from foreroute.engine.ngram_tables.tables import table_keys
from foreroute.engine.parallel.cpu_group import GlooGroup, expert_cpu_group
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.parallel.world import World
from foreroute.engine.routing.live_router import LiveRouter
from foreroute.engine.routing.methods import method_of
from foreroute.engine.routing.planned.given import create_routes, finish_routes
from foreroute.engine.routing.planned_router import PlannedRouter
from foreroute.engine.testing.ranks import run_ranks
from foreroute.engine.train.trainer import Trainer
from foreroute.launch.start.help import CONF

STEPS, SAVED, LAYERS, EXPERTS, K = 3, 2, 2, 4, 2
TABLES = {  # options of section ngram_tables
    "hashed, n-gram tables": {"rows": 90, "heads": 2, "width": 3},
    "dense, n-gram tables": {"rows": 50, "orders": [2], "heads": 2, "width": 4, "layers": [0, 1], "entry": "per_layer"},
    "stochastic, n-gram tables": {
        **{"rows": 70, "orders": [1, 3], "heads": 1, "width": 2, "layers": [1]},
        **{"entry": "values", "keys": "qwen", "place": "host"},
    },
}
VARIANTS: dict[str, dict[str, Any]] = {
    "hashed, weights sum": {"weights": "sum"},
    "hashed, live weights": {"weights": "live", "gate": "sqrt_softplus", "gate_scale": 1.5},
    "hashed, experts without rows": {"constant_experts": 1, "copy_experts": 1, "null_experts": 1},
    "hashed, shared expert": {"shared_width": 6},
    "hashed, residual": {"shared_width": 6, "residual": True},
    "hashed, layers that differ": {"by_layer": {1: {"router": "by_frequency", "experts": 2 * EXPERTS, "ngram": 1}}},
    "strata, growing": {"strata_experts": [EXPERTS, EXPERTS, 2 * EXPERTS, 2 * EXPERTS]},
    "hashed, a live layer": {"by_layer": {0: {"router": "frozen", "experts": 2 * EXPERTS}}},
    **{kind: {} for kind in TABLES},
}
LIVE = {"hashed, a live layer": "frozen"}  # a kind of several methods has the limits of this one
OTHER_K = {"base": 1, "strata": 3}  # with 2 of 4 strata no token reaches the last one
PRE_NORM = {"strata"}  # they need it
OF_A_MICRO_BATCH = {"base", "expert_choice"}  # a token's experts depend on the other tokens of the rank's micro-batch


class Cell(NamedTuple):
    kind: str
    topology: tuple[int, int] = (1, 1)  # ranks, ranks of an expert group
    stage: int = 1
    chunks: int = 1
    gather: bool = False
    recompute: bool = False
    accumulation: int = 1
    bf16: bool = False
    resumed: bool = False
    certified: bool = False

    @property
    def ranks(self) -> int:
        return self.topology[0]


FACTORS: dict[str, tuple[Any, ...]] = {
    "kind": (*router_names(), *VARIANTS),
    "topology": ((1, 1), (2, 2), (2, 1), (4, 4), (4, 2)),
    "stage": (0, 1, 3),
    "chunks": (1, 3),
    "gather": (False, True),
    "recompute": (False, True),
    "accumulation": (1, 2),
    "bf16": (False, True),
    "resumed": (False, True),
    "certified": (False, True),
}


def method_of_kind(kind: str) -> Any:
    return method_of(MoEConfig(router=LIVE.get(kind, kind.partition(",")[0])))


def is_live(kind: str) -> bool:
    method = method_of_kind(kind)
    return method is not None and issubclass(method, LiveRouter)


def is_certified(kind: str) -> bool:
    method = method_of_kind(kind)
    return method is not None and issubclass(method, PlannedRouter) and (method.of_ids or method.of_places)


def is_dense(values: dict[str, Any]) -> bool:
    return values.get("kind", "").partition(",")[0] == "dense"


class Refusal(NamedTuple):
    line: str  # a part of it
    applies: Callable[[dict[str, Any]], bool]  # to values of some factors


REFUSALS = [
    Refusal(
        "nothing to certify",
        lambda values: values.get("certified", False) and is_dense(values) and values["kind"] not in TABLES,
    ),
    Refusal(
        "only routers that follow from the ids, such as hashed, can be certified",
        lambda values: (
            values.get("certified", False)
            and "kind" in values
            and not is_dense(values)
            and not is_certified(values["kind"])
        ),
    ),
    Refusal(
        "moe.options.sizes: expert [2] of [2] slices would lie on several of the 4 ranks",
        lambda values: values.get("kind") == "sized" and values.get("topology") == (4, 4),
    ),
    Refusal(
        "train.precision=bf16: needs train.zero_stage=1, 2 or 3",
        lambda values: values.get("bf16", False) and values.get("stage") == 0,
    ),
]


def refusal(values: dict[str, Any]) -> Refusal | None:
    return next((refusal for refusal in REFUSALS if refusal.applies(values)), None)


# ---- which cells ----

Pair = tuple[tuple[str, Any], tuple[str, Any]]
Factors = dict[str, tuple[Any, ...]]


def pairs_of(values: dict[str, Any]) -> set[Pair]:
    return set(combinations(((name, values[name]) for name in FACTORS if name in values), 2))


def wanted(factors: Factors, *, ordinary: bool) -> set[Pair]:
    """Each pair of values of two factors, but a kind with the other groups of four ranks. Ordinary: of a kind's pairs
    only that with SHARED, and those that are refused."""
    found = {((a, x), (b, y)) for a, b in combinations(factors, 2) for x in factors[a] for y in factors[b]}
    rare = {p for p in found if ordinary and p[0][0] == "kind" and p[1] != SHARED and not refusal(dict(p))}
    groups = zip(FACTORS["kind"], cycle([(4, 2), (4, 4)]))
    other = {(("kind", kind), ("topology", topology)) for kind, topology in groups if kind != "sized"}  # one is refused
    return found - rare - other


def cover(missing: set[Pair], factors: Factors, seed: int) -> list[Cell]:
    """Choose cells until each pair is in one of them, greedily: a cell begins with a missing pair, and each further
    factor has the value with which most missing pairs are in; ties are drawn. A pair that is refused has a cell of its
    own, and is in no other."""
    refused = [pair for pair in missing if refusal(dict(pair))]
    found = [Cell(**{"kind": "hashed", **dict(pair)}) for pair in refused]
    draw, missing = random.Random(seed), missing - set(refused)

    def gain(given: dict[str, Any], name: str, value: Any) -> int:
        more = {**given, name: value}
        return -1 if refusal(more) else len(pairs_of(more) & missing)

    while missing:
        given = dict(draw.choice(sorted(missing, key=repr)))
        for name in draw.sample(list(factors), len(factors)):
            if name not in given:
                values = draw.sample(factors[name], len(factors[name]))
                given[name] = max(values, key=partial(gain, given, name))
        found.append(Cell(**given))
        missing -= pairs_of(given)
    return sorted(found, key=repr)


SHARED = "topology", (2, 2)
UP_TO_2_RANKS = {**FACTORS, "topology": FACTORS["topology"][:3]}


@cache
def ordinary() -> list[Cell]:
    return cover(wanted(UP_TO_2_RANKS, ordinary=True), UP_TO_2_RANKS, seed=0)


@cache
def others() -> list[Cell]:
    """Choose cells for the pairs that the ordinary ones leave out."""
    covered = set[Pair]()
    for cell in ordinary():
        pairs, refused = pairs_of(cell._asdict()), refusal(cell._asdict())
        covered |= {pair for pair in pairs if refusal(dict(pair))} if refused else pairs
    return cover(wanted(FACTORS, ordinary=False) - covered, FACTORS, seed=1)


# ---- a cell's run ----


@cache
def settings(kind: str, folder: Path) -> dict[str, Any]:
    """Options of section moe, those of conf/router/ among them."""
    name = kind.partition(",")[0]
    found = yaml.safe_load((CONF / "router" / f"{name}.yaml").read_text())
    if kind in FILES:
        found["options"]["file"] = str(folder / f"{kind}.npy")
    return {**found, **VARIANTS.get(kind, {})}


def write_routes(path: Path, ids: NDArray[Any]) -> None:
    experts, weights = create_routes(path, (len(ids), LAYERS, K))
    draw = np.random.default_rng(4)
    experts[:] = draw.permuted(np.tile(np.arange(EXPERTS), (len(ids), LAYERS, 1)), axis=2)[..., :K]
    weights[:] = draw.random(weights.shape)
    finish_routes(path, ids, K)


def write_token_table(path: Path, _ids: NDArray[Any]) -> None:
    order = np.tile(np.arange(EXPERTS), (LAYERS, 256, 1))
    np.save(path, np.random.default_rng(5).permuted(order, axis=2)[..., :K])


FILES = {"given": write_routes, "token_table": write_token_table}  # of methods that read one, moe.options.file


def configure(cell: Cell, folder: Path) -> Config:
    k = OTHER_K.get(cell.kind.partition(",")[0], K)
    moe = {
        "experts": EXPERTS,
        "expert_width": 6,
        "plain_width": 6,
        "ngram": 2,
        "rows": 700,
        **settings(cell.kind, folder),
    }
    return Config(
        corpus=CorpusConfig(Corpus.file, str(folder / "text.txt"), cache_dir=str(folder / "cache")),
        data=DataConfig(streams=8, segment=6),
        model=ModelConfig(
            layers=LAYERS,
            width=8,
            heads=1,
            head_width=8,
            memory=6,
            dropout=0.0,
            init_std=0.3,
            pre_norm=cell.kind.partition(",")[0] in PRE_NORM,
        ),
        moe=MoEConfig(**moe | settings(cell.kind, folder)),
        ngram_tables=NgramTablesConfig(**TABLES.get(cell.kind, {})),
        schedule=ScheduleConfig(k_min=k, k_max=k),
        # the update is 0.5 times the gradient
        optim=OptimConfig(lr=500.0, beta1=0.0, eps=1e3, clip=0.0, decay=Decay.constant),
        train=TrainConfig(
            steps=STEPS,
            zero_stage=cell.stage,
            recompute=cell.recompute,
            accumulation=cell.accumulation,
            precision=Precision.bf16 if cell.bf16 else Precision.fp32,
            log_every=1,
        ),
        eval=EvalConfig(k=[1], split=Split.train),
        kernels=KernelsConfig(masked_from_k=99),
        parallel=ParallelConfig(
            expert_ranks=cell.topology[1],
            exchange=ExchangeKind.gather if cell.gather else ExchangeKind.tokens,
            chunks=cell.chunks,
        ),
    )


class Notes:
    """A reporter, and an observer of steps that adds up the experts' rows."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.losses: dict[int, float] = {}
        self.norms: list[float] = []
        self.rows: dict[int, Any] = {}
        self._on, self._layers = False, [module for module in model.modules() if isinstance(module, MoELayer)]
        self._rows_yE = np.zeros((len(self._layers), 2 * EXPERTS), np.int64)
        for number, layer in enumerate(self._layers):
            layer.register_forward_hook(lambda _m, _i, output, number=number: self._add(number, output.count_E))

    def _add(self, layer: int, count_E: torch.Tensor) -> None:
        if self._on:  # not while backward computes again
            self._rows_yE[layer, : len(count_E)] += count_E.numpy()

    @contextmanager
    def forward(self) -> Any:
        self._on = True
        yield
        self._on = False

    def compare(self, step: int) -> None:
        self.rows[step], self._rows_yE = self._rows_yE, np.zeros_like(self._rows_yE)

    def note(self, line: str) -> None:
        pass

    def step(self, step: int) -> None:
        pass

    def metrics(self, step: int, values: dict[str, Any], _seconds_left: float) -> None:
        self.losses[step] = values["loss"]
        self.norms.append(values["grad_norm"])


@cache
def world_of(rank: int, ranks: int, expert_ranks: int) -> World:
    world = World(Mesh(rank, ranks, expert_ranks))
    if ranks == 1:
        return world
    groups = {"cpu_group": GlooGroup(dist.group.WORLD), "planning": GlooGroup(dist.new_group())}
    return replace(world, **groups, planning_group=expert_cpu_group(world.mesh))


def name_of(cell: Cell) -> str:
    return repr(cell).replace("/", "_")


def certificate(cell: Cell, config: Config, folder: Path, rank: int) -> Any:
    """Write the cell's certificate, each rank for itself, and read it."""
    corpus, place = prepare(config.corpus), Placement(cell.ranks, cell.topology[1], cell.ranks)
    layout, ids = Layout(config, place), corpus.split(Split.train)
    layout.check()
    record = Record(layout, ids, range(STEPS))
    keys = table_keys(config.ngram_tables, corpus.vocab.size, config.train.seed)
    found = certify(layout, ids, build_routers(config, corpus), table_keys=keys, also=record.add)
    path = folder / "certificates" / f"{name_of(cell)}, {rank}"
    facts = {"corpus_sha256": corpus.sha256, "tables_sha256": "", "options": to_plain(config)}
    record.write(path, {**facts, **asdict(found)})
    return read(path)


def train(cell: Cell, rank: int, folder: Path) -> Any:
    """Losses, experts' rows of each step and weights in the end; or the line with which the cell is refused."""
    try:
        config = configure(cell, folder)
        written = certificate(cell, config, folder, rank) if cell.certified else None
        corpus, world = prepare(config.corpus), world_of(rank, *cell.topology)
        routers = build_routers(config, corpus, world.mesh)
        trainer = Trainer(config, corpus, routers, folder / name_of(source(cell)), None, world)
        notes = trainer.reporter = Notes(trainer.model)
        if cell.resumed:
            trainer.resume()
            assert trainer.step == SAVED
        save, trainer.save = trainer.save, lambda: save() if trainer.step == SAVED and cell == source(cell) else None
        trainer.config.train.save_every = SAVED
        checks = [Check(written, trainer.model, rank)] if written else []
        assert trainer.run(None, lambda: False, [notes, *checks])
    except (UserError, RunFailed) as error:
        return str(error)
    weights = rows_of_tables(trainer.model)
    for name, state in trainer.engine.read_state():
        value = state["weight"].float().numpy().copy()
        if ".experts." in name:
            experts = world.mesh.local_experts(len(value) * world.mesh.ep_size)
            weights |= {f"{name}@{e}": part for e, part in zip(experts, value, strict=True)}
        else:
            weights[name] = value
    return SimpleNamespace(losses=notes.losses, norms=notes.norms, rows=notes.rows, weights=weights)


def rows_of_tables(model: torch.nn.Module) -> dict[str, Any]:
    """This rank's rows of n-gram tables, "table 0@<row>"."""
    tables = [] if model.ngram_tables is None else model.ngram_tables.tables
    for table in tables:
        table.settle()
    return {
        f"table {number}@{row}": value.numpy().copy()
        for number, table in enumerate(tables)
        for row, value in zip(table.store.owned, table.store.state["value"], strict=True)
    }


def several(rank: int, ranks: int, cells: list[Cell], folder: Path) -> list[Any]:
    """Run the cells in one group of processes."""
    return [train(cell, rank, folder) for cell in cells]


def reference(cell: Cell) -> Cell:
    """The plain cell; with the same micro-batches where the choice or the loss depends on them."""
    if cell.kind in OF_A_MICRO_BATCH:
        return Cell(cell.kind, accumulation=cell.ranks * cell.accumulation)
    if is_live(cell.kind) and method_of_kind(cell.kind).balances and cell.accumulation > 1:
        return Cell(cell.kind, (cell.ranks, 1), accumulation=cell.accumulation)
    return Cell(cell.kind)


def source(cell: Cell) -> Cell:
    """The cell whose checkpoint a resumed one loads: the plain one in the same number format."""
    return reference(cell)._replace(bf16=cell.bf16)


def run(cells: list[Cell], folder: Path) -> dict[Cell, Any]:
    """Run the cells and their references, the latter first; join the ranks' answers."""
    sources = [source(cell) for cell in cells if cell.resumed]
    first, found = [*map(reference, cells), *sources], {}
    for ranks in (1, 2, 4):
        here = [cell for cell in dict.fromkeys([*first, *cells]) if cell.ranks == ranks]
        answers = run_ranks(several, ranks, ranks, here, folder) if here else []
        found |= {cell: join([answer[i] for answer in answers], cell) for i, cell in enumerate(here)}
    return found


def join(answers: list[Any], cell: Cell) -> Any:
    if any(isinstance(answer, str) for answer in answers):
        assert len(set(answers)) == 1, (cell, answers)
        return answers[0]
    weights = {name: value for answer in answers for name, value in answer.weights.items()}
    groups = [answer.rows for answer in answers[:: cell.topology[1]]]
    rows = {step: np.sum([group[step] for group in groups], axis=0) for step in groups[0]}
    return SimpleNamespace(losses=answers[0].losses, norms=answers[0].norms, rows=rows, weights=weights)


# ---- what is compared ----


def faults(cell: Cell, got: Any, want: Any) -> list[str]:
    """What of a cell's run is not as in the plain run."""
    found, steps = [], range(SAVED if cell.resumed else 0, STEPS)
    if sorted(got.losses) != [step + 1 for step in steps] or not np.isfinite(got.norms).all() or min(got.norms) <= 0:
        found.append(f"losses {got.losses}, norms {got.norms}")
        return found
    exact = cell.ranks == 1 and not cell.bf16 and reference(cell).accumulation == cell.accumulation
    exact = exact and not (cell.stage == 3 and "n-gram tables" in cell.kind)  # DeepSpeed's linear adds its bias apart
    for step in steps:
        bound = 0 if exact else 0.03 if cell.bf16 else 1e-6
        if not abs(got.losses[step + 1] - want.losses[step + 1]) <= bound * want.losses[step + 1]:
            found.append(f"loss {got.losses[step + 1]} of step {step + 1}, plain {want.losses[step + 1]}")
        if not (cell.bf16 and is_live(cell.kind)) and not np.array_equal(got.rows[step], want.rows[step]):
            found.append(f"rows {got.rows[step].tolist()} of step {step + 1}, plain {want.rows[step].tolist()}")
    if got.weights.keys() != want.weights.keys():
        found.append(f"parameters {got.weights.keys() ^ want.weights.keys()}")
    elif not cell.bf16:
        largest = max(np.linalg.norm(value) for value in want.weights.values())
        for name, value in got.weights.items():
            error = np.linalg.norm(value - want.weights[name])
            bound = 0 if exact else 1e-6 * np.linalg.norm(want.weights[name]) + 1e-7 * largest
            if not error <= bound:
                found.append(f"{name} is off by {error}")
    return found


def check(cells: list[Cell], found: dict[Cell, Any]) -> None:
    wrong = []
    for cell in cells:
        expected, got = refusal(cell._asdict()), found[cell]
        if isinstance(got, str) or expected is not None:
            good = isinstance(got, str) and expected is not None and expected.line in got and "\n" not in got
            wrong += [] if good else [f"{cell}: {got if isinstance(got, str) else 'runs'}; expected: {expected}"]
        else:
            wrong += [f"{cell}: {line}" for line in faults(cell, got, found[reference(cell)])[:2]]
    assert not wrong, "\n".join(wrong)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    letters = np.random.default_rng(2).random(800) ** 3 * 26 + 97  # some are frequent, some are rare
    (folder / "text.txt").write_bytes(letters.astype(np.uint8).tobytes())
    ids = prepare(configure(Cell("hashed"), folder).corpus).split(Split.train)
    for kind in FILES.keys() & set(FACTORS["kind"]):
        FILES[kind](folder / f"{kind}.npy", ids)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return run(ordinary(), folder)


def test_the_cells_cover_what_they_shall():
    kinds = len(FACTORS["kind"])
    for cells, missing in (
        (ordinary(), wanted(UP_TO_2_RANKS, ordinary=True)),
        ([*ordinary(), *others()], wanted(FACTORS, ordinary=False)),
    ):
        refused = [cell for cell in cells if refusal(cell._asdict())]
        runs = [cell for cell in cells if cell not in refused]
        covered = set().union(*(pairs_of(cell._asdict()) for cell in runs))
        assert {pair for pair in missing - covered if not refusal(dict(pair))} == set()
        assert len(refused) <= kinds + 2 and len(runs) < 12 * kinds
        given = {refusal(cell._asdict()) for cell in refused}
        assert given == {found for found in REFUSALS if len(cells) > len(ordinary()) or "4 ranks" not in found.line}
    assert len(ordinary()) + len(others()) < len(list(product(*FACTORS.values()))) / 200


@pytest.mark.dist
def test_cells_train_like_the_plain_one(found):
    check(ordinary(), found)


@pytest.mark.dist
@pytest.mark.slow
def test_the_other_cells_train_like_the_plain_one(folder):
    check(others(), run(others(), folder))


@pytest.mark.dist
def test_a_plain_run_moves_every_parameter(found, folder):
    """No parameter is unused; of experts at least one in each matrix."""
    for cell, plain in found.items():
        if cell != Cell(cell.kind):
            continue
        assert len(plain.losses) == STEPS and len(set(plain.losses.values())) == STEPS, cell
        config = configure(cell, folder)
        model = build_model(config, prepare(config.corpus).vocab.size)
        before = model.state_dict()
        if model.ngram_tables is not None:
            model.ngram_tables.hold(Mesh(), RowSGD())
            rows = rows_of_tables(model)
            before |= {f"table {y}": [rows[name] for name in rows if name.startswith(f"table {y}@")] for y in (0, 1)}
        moved = set()
        for name, value in plain.weights.items():
            tensor, _, expert = name.partition("@")
            begin = before[tensor][int(expert)] if expert else before[tensor]
            moved |= {tensor} if np.abs(value - np.asarray(begin)).max() > 1e-6 else set()
        assert moved == {name.partition("@")[0] for name in plain.weights}, cell


@pytest.mark.dist
def test_what_is_compared_tells_kinds_apart(found):
    """Negative control: every kind's plain run against that of hashed."""
    plain = {cell.kind: result for cell, result in found.items() if cell == Cell(cell.kind)}
    assert plain.keys() == set(FACTORS["kind"])
    same = {kind for kind, result in plain.items() if not faults(Cell(kind), result, plain["hashed"])}
    assert same == {"hashed"}
