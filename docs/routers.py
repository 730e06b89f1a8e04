"""Writes docs/routers.md from the methods' cards and the files in conf/router/: `python docs/routers.py`."""

import inspect
import os
import re
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from foreroute.engine.config import MoEConfig
from foreroute.engine.config.model import router_names
from foreroute.engine.routing.method_options import Card
from foreroute.engine.routing.methods import Method, method_of
from foreroute.engine.routing.planned_router import PlannedRouter

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PAGE = HERE / "routers.md"
INTRO = """# Routers

    .venv/bin/python -m launch.train experiment=quickstart router=top_p
    .venv/bin/python -m launch.train experiment=quickstart router=top_p moe.options.least=0
    .venv/bin/python -m launch.train -m experiment=debug router=hashed,frozen train.name=two

`router=NAME` is a file in [conf/router/](../conf/router), which goes over the experiment's options: it sets
`moe.router`, the method's own options, and what else it needs. `moe.router=NAME` alone works, too. A method is one
class in one file; [your_own_router.md](your_own_router.md) explains one of yours. This page is written by
`python docs/routers.py` from the methods' cards, and a test compares it with the code.

A *planned* router depends on what the loader knows before a batch arrives, so a step exchanges no counts and its host
waits for none. A *live* router depends on hidden states. Routers whose choices follow from the text alone
have a [certificate](certificate.md), which counts a run's rows and bytes beforehand.

`hashed` with weights from its table is the default. At the quickstart's size with ten seeds
([study](study/counts_and_weights.md)) `top_p` with copies, at equal mean FLOPs, is worse by 0.019 bpc (95% interval
0.011 to 0.028). `moe.weights=live` is better by 0.011 (0.002 to 0.019) at the k of training, and worse by 0.36 at k = 1
and by 0.15 at k = 16: take it where a model runs at one k."""
COMBINED = """## Works that are a combination of options

Each line is a start, over `experiment=quickstart`; numbers are examples."""
TOGETHER = """## What goes together

[test_composition.py](../tests/engine/train/test_composition.py) trains every router on 1, 2 and 4 ranks, with ZeRO 0, 1
and 3, chunks, both exchanges, recomputation, accumulation, bf16, resumed on another layout of ranks, and held to its
certificate. Every pair of these is in a run that equals the plain run on one rank. Refused, with one line, are a
certificate for routers without one, bf16 with ZeRO 0, and wide experts of `sized` that would lie on several ranks.

* `base` and `expert_choice` choose among the tokens of a rank's micro-batch. Their runs are those of one rank with the
  same micro-batches.
* A balance loss counts the tokens of one forward pass, so accumulation changes it."""


class Work(NamedTuple):
    """A published work, and the options that make it."""

    name: str
    options: str  # of launch.train
    about: str


WORKS = [
    Work("AdaMoE, planned (arXiv 2406.13233)", "router=top_p moe.null_experts=4", "null experts count among the k"),
    Work(
        "MoE++, planned (arXiv 2410.07348)",
        "router=top_p moe.constant_experts=2 moe.copy_experts=1 moe.null_experts=1",
        "experts that cost no row and no byte, without the gate of the layer before",
    ),
    Work(
        "DeepSeekMoE (arXiv 2401.06066), DiT-MoE (arXiv 2407.11633)",
        "moe.experts=64 moe.expert_width=32 schedule.k_min=16 schedule.k_max=16 moe.shared_width=128",
        "many small experts and a shared one",
    ),
    Work(
        "PR-MoE (DeepSpeed-MoE, arXiv 2201.05596)",
        "moe.shared_width=128 moe.residual=true moe.by_layer={2:{experts:32}}",
        "experts and a dense part, weighed by a learned softmax; more experts in deeper layers",
    ),
    Work(
        "hash layers of DeepSeek-V4 with tables from the text",
        "moe.ngram=1 moe.weights=live moe.gate=sqrt_softplus moe.gate_scale=1.5",
        "the choice by a table, the weights by a learned gate; `token_table` reads theirs",
    ),
    Work(
        "StableMoE's second stage (arXiv 2204.08396)",
        "router=token_table moe.options.file=FILE moe.gate=sigmoid",
        "a frozen choice with a live gate; `launch.analyse table=FILE` writes the table of a trained live router",
    ),
    Work(
        "Union of Experts' MLP (arXiv 2503.02495)",
        "moe.weights=sum",
        "slices of one feed-forward, added up: at k = all experts it is a dense layer",
    ),
    Work(
        "self-slimming (SMoE-Dropout, arXiv 2303.01610)",
        "router=frozen schedule.growth=linear schedule.k_min=2 schedule.k_max=16",
        "k grows; any router has it, and each run is evaluated at every k of `eval.k`",
    ),
    Work(
        "Demons in the Detail (arXiv 2501.11873)",
        "router=learned moe.balance_over=global",
        "the balance loss counts the tokens of all ranks; the default",
    ),
    Work(
        "Post-MoE, experts in the last layers alone",
        "moe.layers=[2]",
        "other layers are dense, of width `moe.plain_width`",
    ),
    Work(
        "OpenMoE's finding (arXiv 2402.01739)",
        "router=learned",
        "`launch.analyse` tells how far a live router's choices are a function of the last ids, by layer",
    ),
]
OUT_OF_SCOPE = [
    (
        "MH-MoE (arXiv 2404.15045)",
        "parts of tokens, routed one by one: a layer of its own, for your model, in examples/mh_moe.py",
    ),
    ("Soft MoE; DSelect-k", "Soft MoE mixes all tokens, without routes; DSelect-k's smooth steps are in COMET's gate"),
    (
        "Tutel, FSMoE, SE-MoE, ExFlow, MoETuner, ExpertFlow",
        "schedules, placement and prefetch of a given routing: systems, not routers",
    ),
    (
        "M-SMoE, MC-SMoE, MEO, task-agnostic pruning, QMoE, SCMoE",
        "they change a trained model or its decoding; there is no such program here",
    ),
    ("MoEfication, sparse upcycling, PESC", "they start from a dense checkpoint, which foreroute does not read"),
    ("MPO-MoE", "experts that share a central tensor: another parametrisation of experts, not another routing"),
    ("Composition of Experts, Tryage, MoE^2, Glider", "they route prompts between whole models"),
    ("MoGU, UOE unlearning, MoS, Multi-Head Adapter Routing, Polytropon", "safety, and adapters of tasks"),
    ("GMoE, MoE-LLaVA, DiT's images, Tutel's SwinV2, vision in Union of Experts", "foreroute trains language models"),
    ("Union of Experts' attention", "heads as experts need another gather of keys and values"),
    ("medical data, language families", "data, not routing"),
    ("DiffusionNAG, multi-objective GFlowNets, overviews and surveys", "there is nothing to train here"),
]


def page() -> str:
    """Return the text of the page."""
    methods = {name: method_of(MoEConfig(router=name)) for name in router_names()}
    built_in = {name: method for name, method in methods.items() if method is not None}
    parts = [INTRO]
    for kind, planned in (("Planned", True), ("Live", False)):
        rows = [_row(f"`{n}`", m) for n, m in built_in.items() if issubclass(m, PlannedRouter) is planned]
        parts.append("\n".join([f"## {kind} routers", "", *_HEAD, *rows]))
    parts.append("`dense` is none: feed-forwards of equal parameters.")
    rows = [_row(f"`{_path(method)}`", method) for method in _examples()]
    examples = (
        "Each is one file on the public protocol, in [examples/routers/](../examples/routers): `moe.router=PATH`."
    )
    parts.append("\n".join(["## Examples", "", examples, "", *_HEAD, *rows]))
    parts.append("\n".join(["## Options of their own", "", *_options(built_in)]))
    works = [f"| {work.name} | `{work.options}` | {work.about} |" for work in WORKS]
    parts.append("\n".join([COMBINED, "", "| work | options | |", "|---|---|---|", *works]))
    parts.append(TOGETHER)
    out = [f"| {name} | {why} |" for name, why in OUT_OF_SCOPE]
    parts.append("\n".join(["## Out of scope", "", "| work | why |", "|---|---|", *out]))
    return "\n\n".join(parts) + "\n"


_HEAD = ["| router | how it chooses | source | cost | for whom | certificate |", "|---|---|---|---|---|---|"]


def _row(name: str, method: Method) -> str:
    card: Card = method.card
    source = os.path.relpath(inspect.getsourcefile(method) or "", HERE).replace("foreroute/", "", 1)
    certified = "yes" if issubclass(method, PlannedRouter) and (method.of_ids or method.of_places) else "no"
    what, where, cost, when = map(_plain, card)
    return f"| [{name}]({source}) | {what} | {where} | {cost} | {when} | {certified} |"


def _path(method: Method) -> str:
    return f"{method.__module__}:{method.__name__}"


def _examples() -> list[Method]:
    """Return the routers in examples/routers/."""
    found = []
    for file in sorted((ROOT / "examples" / "routers").glob("[!_]*.py")):
        module = import_module(f"examples.routers.{file.stem}")
        kinds = [value for value in vars(module).values() if isinstance(value, type) and "card" in vars(value)]
        found += [kind for kind in kinds if kind.__module__ == module.__name__]
    return found


def _options(methods: dict[str, Method]) -> list[str]:
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for name, method in methods.items():
        found = yaml.safe_load((ROOT / "conf" / "router" / f"{name}.yaml").read_text(encoding="utf-8"))
        texts = _help(method, found.get("options", {}))
        for option, default in found.get("options", {}).items():
            shown = yaml.safe_dump(default, default_flow_style=True).split("\n")[0]
            rows.append(f"| `router={name} moe.options.{option}` | `{shown}` | {_plain(texts[option])} |")
        for option, value in found.items():
            if option not in ("router", "options"):
                rows.append(f"| `router={name}` sets `moe.{option}` | `{value}` | |")
    return rows


def _plain(text: str) -> str:
    return re.sub(r"\bNone\b", "null", text).replace("|", "\\|")


def _help(method: Method, options: dict[str, Any]) -> dict[str, str]:
    """Return the help texts of the method's own options."""
    kinds = [kind for kind in vars(import_module(method.__module__)).values() if is_dataclass(kind)]
    texts = ({field.name: field.metadata.get("help", "") for field in fields(kind)} for kind in kinds)
    return next((found for found in texts if found.keys() == options.keys()), {})


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
