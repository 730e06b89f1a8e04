"""Search for tiles that are faster than those of kernels/tiles.py on this GPU, by climbing from the table's own.

Each round tries every tile that differs from the best entry in one number. It compiles them in several processes,
checks each against the results of the table's tiles, and times the launches that it changes; the best change of each
product is taken. A plain layer and one with a gate are timed together, since they share tiles and the number of rows.
In the end the table's entry and the best one are timed in turn. The best entry is printed in the form of
kernels/tiles.py if it takes less than 0.97 of the time.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.gpu_check.setting import Setting, in_processes
from benchmarks.harness import median_ms
from foreroute.kernels import ExpertRows, ExpertWeights, moe_ffn, tiles
from foreroute.kernels.launching import Launch, arch_of, recording
from foreroute.kernels.testing.cases import Case, make_case, run_layer, worst_error
from foreroute.kernels.tiles import Entry

BETTER = 0.97  # of the time
SAME = {"half": 1e-2, "tf32": 5e-3, "ieee": 1e-5}  # relative error between tiles
_SHARE_ROWS = ("up", "gated_up", "down", "backward", "gated_backward")
_LIMITS = {"rows": (16, 128), "columns": (16, 256), "depth": (16, 128), "num_warps": (1, 8), "num_stages": (1, 4)}


class Aim(NamedTuple):
    """An entry of the table, and a layer to time it with."""

    arithmetic: str  # as kernels.tiles.entry_of names it
    few: bool
    shape: tuple[int, int, int, int, int]  # T, D, F, L, K
    device: str

    @property
    def name(self) -> str:
        """The entry's name, in words."""
        return f"{self.arithmetic}, {'few' if self.few else 'many'} rows"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the layer's numbers."""
        return torch.bfloat16 if self.arithmetic == "half" else torch.float32


AIMS = (
    ("half", False, (11264, 512, 512, 16, 4)),  # speed.py's enwik8_12l
    ("tf32", False, (11264, 512, 512, 16, 4)),
    ("half", True, (256, 512, 512, 16, 2)),
)
TINY = ("ieee", False, (16, 16, 32, 2, 1))


@dataclass(slots=True)
class Climb:
    """The state of a climb."""

    best: Entry
    tried: set[Entry] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)  # what computes something else than the table


def tile_sweep(setting: Setting) -> dict[str, Any]:
    """Climb for each aim, half of the time that is left for each; print the entries that are better."""
    aims = [Aim(*TINY, setting.device)] if setting.dry_run else [Aim(*aim, setting.device) for aim in AIMS]
    until = time.monotonic() + setting.seconds
    arch = arch_of(torch.empty(0, device=setting.device))
    found: dict[str, Any] = {"failed": [], "tried": 0, "better": {}}
    for aim in aims:
        ends = time.monotonic() + (until - time.monotonic()) * (1.0 if aim is aims[-1] else 0.5)
        table = tiles.entry_of(arch, aim.arithmetic, few=aim.few)
        in_processes(partial(_compile, aim=aim, table=table), (0, 1), 0.5 * (ends - time.monotonic()))
        done = climb(
            table,
            partial(_next_to, aim=aim, only=[*neighbours(table, aim)][:2] if setting.dry_run else None),
            partial(_errors, aim=aim, table=table, until=ends),
            partial(_gain, aim=aim),
            aim.arithmetic,
            ends,
        )
        found["tried"] += len(done.tried)
        found["failed"] += [f"{aim.name}: {line}" for line in done.wrong]
        ratio = found[f"ratio {aim.name}"] = _ratio(aim, table, done.best)
        if ratio < BETTER:
            print(f"\nkernels/tiles.py, {arch}, {aim.name}: {ratio:.3f} of the table's time\n{text(done.best)}")
            found["better"][f"{arch}, {aim.name}"] = text(done.best)
    return found


def climb(
    table: Entry,
    next_to: Callable[[Entry], list[Entry]],
    errors: Callable[[list[Entry]], Mapping[int, float | Exception]],
    gain: Callable[[Entry, Entry], float],
    arithmetic: str,
    until: float,
) -> Climb:
    """Climb from the table's entry to faster ones until none is left, or time.monotonic() reaches `until`.

    Args:
        next_to: returns the entries to try from one.
        errors: returns, by number, how far an entry's results are from the table's; an entry that cannot run has an
            exception or nothing.
        gain: returns the time that the second entry saves over the first; not above 0 where it is noise.
    """
    state = Climb(table)
    while time.monotonic() < until:
        entries = [entry for entry in next_to(state.best) if entry not in state.tried]
        if not entries:
            break
        state.tried |= {*entries}
        faster: dict[str, tuple[float, Entry]] = {}
        for number, error in sorted(errors(entries).items()):
            entry, product = entries[number], _product(state.best, entries[number])
            if isinstance(error, Exception) or time.monotonic() > until:
                continue
            if not error <= SAME[arithmetic]:
                state.wrong.append(f"{product} of {entry} differs by {error:.1e}")
                continue
            saved = gain(state.best, entry)
            if saved > faster.get(product, (0.0, entry))[0]:
                faster[product] = saved, entry
        if not faster:
            break
        state.best = _taken(state.best, faster)
    return state


def neighbours(entry: Entry, aim: Aim) -> Iterator[Entry]:
    """Return the entries that differ in one number of one tile, or in the number of rows that several share."""
    for rows in (entry.up.rows // 2, entry.up.rows * 2):
        if _LIMITS["rows"][0] <= rows <= _LIMITS["rows"][1]:
            yield entry._replace(**{name: replace(getattr(entry, name), rows=rows) for name in _SHARE_ROWS})
    for name, tile in entry._asdict().items():
        for number, (least, most) in _LIMITS.items():
            if number == "rows" and name in _SHARE_ROWS:
                continue
            value = getattr(tile, number)
            for other in (value - 1, value + 1) if number == "num_stages" else (value // 2, value * 2):
                if least <= other <= most and not (number == "columns" and other > max(aim.shape[1:3])):
                    yield entry._replace(**{name: replace(tile, **{number: other})})


def _next_to(entry: Entry, *, aim: Aim, only: list[Entry] | None) -> list[Entry]:
    return [*neighbours(entry, aim)] if only is None else only


def text(entry: Entry) -> str:
    """Write an entry in the form of kernels/tiles.py."""
    lines = [
        f"    {name}=Tile({tile.rows}, {tile.columns}, {tile.depth}, {tile.num_warps}, {tile.num_stages}),"
        for name, tile in entry._asdict().items()
    ]
    return "\n".join(("Entry(", *lines, ")"))


def _product(before: Entry, after: Entry) -> str:
    """Name the tile that differs; "rows" where several do."""
    changed = [name for name in Entry._fields if getattr(before, name) != getattr(after, name)]
    return changed[0] if len(changed) == 1 else "rows"


def _taken(best: Entry, faster: Mapping[str, tuple[float, Entry]]) -> Entry:
    """Take the change of the shared rows if it saves most, else the best change of every tile."""
    each = {name: found for name, found in faster.items() if name != "rows"}
    if "rows" in faster and faster["rows"][0] >= sum(saved for saved, _ in each.values()):
        return faster["rows"][1]
    return best._replace(**{name: getattr(entry, name) for name, (_, entry) in each.items()})


def _errors(entries: list[Entry], *, aim: Aim, table: Entry, until: float) -> dict[int, float | Exception]:
    return in_processes(partial(error_of, aim=aim, table=table), entries, 0.7 * (until - time.monotonic()))


def _compile(number: int, *, aim: Aim, table: Entry) -> None:
    """Leave the kernels of one case in Triton's cache, before many processes want them at once."""
    with _with(table):
        _layer(_cases(aim)[number], aim)


def error_of(entry: Entry, *, aim: Aim, table: Entry) -> float:
    """Compile an entry, and return the largest relative error between its results and the table's."""
    with _with(entry):
        got = [_layer(case, aim) for case in _cases(aim)]
    return max(worst_error(*pair)[0] for pair in zip(got, _results(aim, table), strict=True))


def _gain(before: Entry, after: Entry, *, aim: Aim) -> float:
    """Return the milliseconds that are saved, of the launches that differ."""
    old, new = _launches(aim, before), _launches(aim, after)
    differ = [name for name in old if _tiling(old[name]) != _tiling(new[name])]
    both = {f"{name} {i}": launches[name] for i, launches in enumerate((old, new)) for name in differ}
    ms = _timed(both, aim.device, rounds=7)
    was, now = (sum(value for name, value in ms.items() if name.endswith(f" {i}")) for i in (0, 1))
    return was - now if now < BETTER * was else 0.0


def _ratio(aim: Aim, table: Entry, best: Entry) -> float:
    """Return the time of all launches on the best entry's tiles over that on the table's, in turn."""
    if table == best:
        return 1.0
    both = {f"{name} {i}": one for i, e in enumerate((table, best)) for name, one in _launches(aim, e).items()}
    ms = _timed(both, aim.device, rounds=20)
    was, now = (sum(value for name, value in ms.items() if name.endswith(f" {i}")) for i in (0, 1))
    return now / was


def _timed(launches: Mapping[str, Launch], device: str, rounds: int) -> dict[str, float]:
    def call(one: Launch) -> Callable[[], object]:
        return lambda: one.kernel[(one.programs,)](**one.arguments, **one.options)

    rounds, warmup = (1, 0) if device == "cpu" else (rounds, 2)
    return median_ms({name: call(one) for name, one in launches.items()}, rounds, device=device, warmup=warmup)


def _launches(aim: Aim, entry: Entry) -> dict[str, Launch]:
    """Return the launches of a plain layer and of one with a gate that work on tiles, forward and backward."""
    found: dict[str, Launch] = {}
    for layer, case in zip(("plain", "gated"), _cases(aim), strict=True):
        with _with(entry), recording() as recorder:
            _layer(case, aim)
        tiled = [one for one in recorder.launches if {"BLOCK_K", "BLOCK_F"} & one.arguments.keys()]
        found |= {f"{layer} {number}": one for number, one in enumerate(tiled)}
    return found


def _tiling(launch: Launch) -> dict[str, int]:
    return launch.options | {name: size for name, size in launch.arguments.items() if name.startswith("BLOCK_")}


@cache
def _cases(aim: Aim) -> list[Case]:
    """Return a plain case and one with a gate, on the device."""
    made = []
    for gated in (False, True):
        case = make_case(aim.shape, gated=gated).rounded(aim.dtype)
        x_TD, weight_N = (t.to(aim.device, torch.float32) for t in case[:2])
        weights = [None if w is None else w.to(aim.device, aim.dtype) for w in case.weights]
        rows = ExpertRows(*(index.to(aim.device) for index in case.rows.tensors()))
        made.append(Case(x_TD, weight_N, ExpertWeights._make(weights), rows))
    return made


@cache
def _results(aim: Aim, entry: Entry) -> list[dict[str, Tensor]]:
    with _with(entry):
        return [_layer(case, aim) for case in _cases(aim)]


def _layer(case: Case, aim: Aim) -> dict[str, Tensor]:
    precision = "tf32" if aim.arithmetic == "tf32" else "ieee"
    return run_layer(moe_ffn, case, aim.dtype, device=aim.device, backend="triton", precision=precision, dweight=False)


@contextmanager
def _with(entry: Entry) -> Iterator[None]:
    """Let kernels use an entry; lookups that were remembered are forgotten."""
    remembered = tiles._ffn_tiles.__wrapped__
    with patch.object(tiles, "entry_of", lambda *_, **__: entry), patch.object(tiles, "_ffn_tiles", remembered):
        yield
