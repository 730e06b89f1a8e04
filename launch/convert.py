"""Turn a dense model of transformers into one with experts: `python -m launch.convert model=FOLDER out=FOLDER
start=split experts=8 k=4 text=FILE`.

Feed-forwards become copies (start=copy), slices (start=split) or adapters beside them (start=adapters); docs/convert.md
says what each preserves. Which slices a token gets follows from a table of its id or n-gram that is made on the text
(choose=table), from a live router that is trained on it (choose=live), or from a random table (choose=random). Then
outputs on the text are compared with the dense model's at several k, and the model is written with its tables.
"""

import copy
import tempfile
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foreroute.engine.config import Builder, MoEConfig, RouteWeights
from foreroute.engine.config.option import check, option
from foreroute.engine.convert import Adapters, Copies, Slices, train_slice_routers
from foreroute.engine.convert.slice_router import SLICE_ROUTER
from foreroute.engine.errors import UserError, require
from foreroute.engine.plug_in import save_pretrained
from foreroute.launch.start.cli import run_program
from foreroute.launch.start.console import table
from foreroute.launch.start.process import set_up

_CHECKED = 4  # batches of the text on which outputs are compared


class Start(Enum):
    """The origin of the experts."""

    copy = "copy"  # each is the dense feed-forward
    split = "split"  # each has a share of its hidden units
    adapters = "adapters"  # each is small and reads the output of the frozen feed-forward


class Choose(Enum):
    """The choice of a token's experts."""

    table = "table"  # slices alone: a table made on the text
    live = "live"  # slices: a router trained on the text; copies and adapters: a learned router
    random = "random"  # a random table


@dataclass
class ConvertArgs:
    """Options."""

    model: str = option("", "Folder of a dense model of transformers; needed.")
    out: str = option("", "New folder for the converted model; needed.")
    start: Start = Start.split
    experts: int = option(8, "Experts of each feed-forward.", at_least=1)
    k: int | None = option(None, "Active experts; None: half of them.", at_least=1)
    choose: Choose | None = option(None, "Choice of a token's experts. None: table for split, random for others.")
    ngram: int = option(1, "Ids in a table's key: the n-gram that ends at the token.", at_least=1, at_most=4)
    rows: int = option(65536, "Rows of a table with n-grams of several ids, which share rows by hash.", at_least=1)
    text: str | None = option(None, "File of lines for tables, routers and the comparison. None: drawn ids.")
    lines: int = option(1000, "Lines of the text that are read.", at_least=1)
    noise: float = option(0.0, "start=copy: noise on each copy, as a share of a matrix's deviation.", at_least=0)
    width: int = option(64, "start=adapters: hidden width of an adapter.", at_least=1)
    seed: int = option(0, "Of clusters, tables and what is drawn.", at_least=0)
    threads: int = option(0, "CPU threads of PyTorch; 0 leaves its default.")

    def __post_init__(self) -> None:
        check("", self)
        require(bool(self.model), "model is missing: the folder of a dense model of transformers")
        require(bool(self.out), "out is missing: a new folder for the converted model")
        require(not Path(self.out).exists(), f"out={self.out}: is there already; name a new folder")
        if self.choose is None:
            self.choose = Choose.table if self.start is Start.split else Choose.random
        if self.k is None:
            self.k = max(1, self.experts // 2)
        require(self.k <= self.experts, f"k={self.k}: must be at most experts={self.experts}")
        planned = self.choose is not Choose.table or self.start is Start.split
        require(planned, f"choose=table with start={self.start.name}: must be random or live; tables are of slices")
        needs_text = self.start is Start.split and self.choose is not Choose.random
        require(
            not needs_text or self.text is not None,
            f"text is missing: choose={self.choose.name} with start=split is made on a text; or choose=random",
        )


def convert(args: ConvertArgs) -> int:
    """Convert, compare, write; returns the exit code."""
    set_up(args.threads)
    try:
        from foreroute.engine.hugging_face import calibration, converted_folder, dense_models
    except ImportError as error:
        raise UserError(f"launch.convert needs transformers: make hf installs it ({error})") from error
    assert args.k is not None and args.choose is not None
    dense = converted_folder.open_dense(args.model).eval()
    batches = _drawn(dense) if args.text is None else calibration.read_lines(args.model, args.text, args.lines)
    model = copy.deepcopy(dense)
    moe = _section(args)
    with tempfile.TemporaryDirectory() as place:
        if args.start is Start.split and args.choose is Choose.table:
            file = Path(place) / "slices.safetensors"
            moe = dense_models.plan_family_slices(model, batches, moe=moe, file=file, seed=args.seed)
        experts = dense_models.convert_model(model, _start(args), moe=moe, k=args.experts, seed=args.seed)
    experts.attach(model, ids="input_ids", mask="attention_mask", layout="BQ")
    if moe.router == SLICE_ROUTER:
        train_slice_routers(model, batches, seed=args.seed)
    moe = experts.moe
    print(
        f"{type(dense).__name__}: {len(experts.replaced)} feed-forwards, {args.experts} experts of {moe.expert_width}"
        f" {moe.activation.name} units each, start={args.start.name} choose={args.choose.name}"
    )
    rows = []
    for experts.k in sorted({1, args.k, args.experts}):
        rows.append([str(experts.k), f"{_difference(model, dense, batches[:_CHECKED]):.1e}"])
    print(table(["k", "outputs differ"], rows))
    experts.k = args.k
    model.config.foreroute["k"] = args.k
    save_pretrained(model, args.out, weights_only=True)
    print(f"written: {args.out}, k={args.k}")
    return 0


def _section(args: ConvertArgs) -> MoEConfig:
    split = args.start is Start.split
    router = "hashed"
    if args.choose is Choose.live:
        router = SLICE_ROUTER if split else "learned"
    return MoEConfig(
        router=router,
        experts=args.experts,
        ngram=args.ngram,
        rows=args.rows,
        builder=Builder.random,
        weights=RouteWeights.sum if split else RouteWeights.table,
    )


def _start(args: ConvertArgs) -> Copies | Slices | Adapters:
    if args.start is Start.copy:
        return Copies(noise=args.noise)
    return Slices() if args.start is Start.split else Adapters(width=args.width)


def _drawn(model: Any) -> list[dict[str, Tensor]]:
    """Return one batch of ids that are drawn, for the comparison alone."""
    rows = model.get_input_embeddings().weight.shape[0]
    ids_BQ = torch.randint(0, rows, (8, 32), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids_BQ, "attention_mask": torch.ones_like(ids_BQ)}]


@torch.no_grad()
def _difference(model: Any, dense: Any, batches: list[dict[str, Tensor]]) -> float:
    """Return the norm of the difference of outputs divided by that of the dense model's, without padding."""
    apart = size = 0.0
    for batch in batches:
        real_BQ = batch["attention_mask"].bool()
        got, want = (one(**batch)[0][real_BQ].double() for one in (model, dense))
        apart, size = apart + ((got - want) ** 2).sum().item(), size + (want**2).sum().item()
    return float((apart / size) ** 0.5)


def main() -> None:
    """Entry point."""
    run_program("convert", ConvertArgs, convert)


if __name__ == "__main__":
    main()
