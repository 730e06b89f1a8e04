"""Make a trained run smaller: `python -m launch.compress run=runs/NAME out=runs/SMALLER method=merge experts=8`.

`merge` makes experts that are alike one, `prune` drops the least used ones, `int8` keeps the experts' matrices in a
quarter of the bytes (engine/compress/). `out` is a run's folder like any other: launch.evaluate and launch.generate
take it, and training goes on from it; int8 is for evaluation alone. Its compressed.json has what was done. Prints what
became of the experts of each table and, as its last line, one JSON object.
"""

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from foreroute.engine.checkpoint.trained_run import SavedRun, open_saved
from foreroute.engine.compress import saved
from foreroute.engine.compress.choose import By, Choice, Method, Request, check_run, choose, smaller
from foreroute.engine.config import MoEConfig, Split, to_plain
from foreroute.engine.config.option import check, option, required
from foreroute.engine.errors import RunFailed, require
from foreroute.engine.metrics.names import JSONL
from foreroute.engine.moe.int8_weights import holds_int8
from foreroute.launch.runs.folder import CONFIG, STATE, TextArgs, read_run, write_json
from foreroute.launch.start.cli import run_program
from foreroute.launch.start.config_files import write_config
from foreroute.launch.start.console import table
from foreroute.launch.start.process import set_up

COMPRESSED = "compressed.json"


@dataclass
class CompressArgs:
    """Options."""

    run: str = required("Folder of the trained run.")
    out: str = required("Folder of the smaller run; must not exist.")
    method: Method = Method.merge
    experts: int | None = option(None, "Experts that are left in each layer; merge and prune need it.")
    by: By | None = option(None, "Number by which experts are merged or pruned; None: outputs merges, use prunes.")
    k: int | None = option(None, "Active experts at which use is counted; None means schedule.k_max.", at_least=1)
    split: Split = option(Split.train, "Text on which use is counted and outputs are compared.")
    symbols: int = option(4096, "For by=outputs: the first so many symbols of it are compared.", at_least=1)
    ranks: int | None = option(None, "Ranks that will share the experts; None: parallel.expert_ranks.", at_least=1)
    seed: int = option(1, "Of by=random.", at_least=0)
    threads: int = option(0, "CPU threads of PyTorch; 0 leaves its default.")
    corpus: TextArgs = field(default_factory=TextArgs)

    def __post_init__(self) -> None:
        check("", self)
        takes = self.method is not Method.int8
        require(takes == (self.experts is not None), f"experts={self.experts}: merge and prune need it, int8 has none")
        require(takes or self.by is None, f"by={self.by and self.by.name}: goes with merge and prune, int8 has none")


def compress(args: CompressArgs) -> int:
    """Write the smaller run; returns the exit code."""
    set_up(args.threads)
    folder, out = Path(args.run), Path(args.out)
    require(not out.exists(), f"out={out}: is there already; must be a new folder")
    config = read_run(folder, args.corpus)
    request = _request(args, config.moe, config.schedule.k_max)
    if request is not None:
        check_run(config.moe, request, args.ranks or config.parallel.expert_ranks)
    require(not config.moe.dense, f"run={folder}: is dense, and has no experts")
    new = replace(config, train=replace(config.train, name=out.name, runs_dir=str(out.parent)))
    if request is not None:
        moe, kernels = smaller(config.moe, request.experts), config.kernels
        if kernels.masked_from_k is not None:
            kernels = replace(kernels, masked_from_k=min(kernels.masked_from_k, moe.experts + 1))
        every_k = [k for k in config.eval.k if k <= moe.columns] or [config.schedule.k_max]
        new = replace(new, moe=moe, kernels=kernels, eval=replace(config.eval, k=every_k))
    run = open_saved(folder, config, print)
    require(not holds_int8(run.model), f"run={folder}: has int8 weights; must be the run that it was made of")
    choices = [] if request is None else choose(run, request)
    facts = _facts(args, run, request, choices)
    before, after = _write(folder, replace(run, config=new), choices, facts, columns=config.moe.columns)
    for line in _lines(choices):
        print(line)
    print(f"{out}: experts of {after:,} bytes instead of {before:,}, without Adam's moments")
    print(json.dumps({**facts, "expert_bytes": after, "expert_bytes_before": before}))
    return 0


def _request(args: CompressArgs, moe: MoEConfig, k_max: int) -> Request | None:
    if args.experts is None:
        return None
    k = k_max if args.k is None else args.k
    require(moe.dense or k <= moe.fewest_experts, f"k={k}: must be at most moe.experts={moe.experts}")
    by = args.by or (By.outputs if args.method is Method.merge else By.use)
    return Request(args.method, by, args.experts, k, args.split, args.symbols, args.seed)


def _facts(args: CompressArgs, run: SavedRun, request: Request | None, choices: list[Choice]) -> dict[str, Any]:
    """Return what was done, for compressed.json and the manifest."""
    found = {"run": str(args.run), "step": run.step, "method": args.method.name}
    if request is None:
        return found
    tables = [
        {
            "group": choice.groups.group_E.tolist(),
            "leader": choice.groups.leader_G.tolist(),
            "use": choice.use_E.tolist(),
        }
        for choice in choices
    ]
    return found | {**to_plain(request), "tables": tables}


def _write(
    folder: Path, run: SavedRun, choices: list[Choice], facts: dict[str, Any], *, columns: int
) -> tuple[int, int]:
    """Write the folder that the configuration names; return the bytes of the experts before and after.

    Args:
        folder: of the source.
        run: with the new configuration.
        columns: experts and columns without one, of the source.
    """
    config = run.config
    out = Path(config.train.runs_dir) / config.train.name
    sizes: list[int] = []

    def change(tensors: saved.Tensors) -> saved.Tensors:
        changed = saved.with_groups(tensors, choices, columns) if choices else saved.with_int8(tensors)
        sizes.extend(map(saved.expert_bytes, (tensors, changed)))
        return changed

    name = f"checkpoints/step-{run.step:08d}"
    try:
        out.mkdir(parents=True)
        saved.rewrite(folder / name, out / name, change, {"config": to_plain(config), "compressed": facts})
        for file, content in run.corpus.vocab.files().items():
            (out / file).write_bytes(content)
        if (folder / JSONL).exists():
            shutil.copyfile(folder / JSONL, out / JSONL)
        write_json(out / COMPRESSED, facts)
        write_json(out / STATE, {"state": "stopped", "step": run.step})
        write_config(config, out / CONFIG)
    except OSError as error:
        raise RunFailed(f"out={out}: cannot be written ({error.strerror or error})") from error
    before, after = sizes
    return before, after


def _lines(choices: list[Choice]) -> list[str]:
    """Tabulate the experts of each table, by their old numbers, and their use."""
    rows = []
    for number, choice in enumerate(choices):
        group_E, use_E = choice.groups.group_E, choice.use_E
        members = [
            [e for e, group in enumerate(group_E.tolist()) if group == g] for g in range(len(choice.groups.sizes))
        ]
        use_G = [use_E[of].sum() for of in members]
        names = ["+".join(map(str, of)) for of in members]
        rows.append(
            [
                str(number),
                " ".join(names),
                f"{max(use_G) * len(use_G) / sum(use_G):.3f}",
                f"{sum(use_G) / use_E.sum():.1%}",
            ]
        )
    return [table(["table", "experts", "busiest / mean", "use that is left"], rows)] if rows else []


def main() -> None:
    """Entry point."""
    run_program("compress", CompressArgs, compress)


if __name__ == "__main__":
    main()
