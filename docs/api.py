"""Writes docs/api.md, the public names with the first sentence of their docstrings: `python docs/api.py`."""

import inspect
import os
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = HERE / "api.md"
MODULES = {
    "foreroute": "The names that most need; each is loaded when it is asked for.",
    "foreroute.engine.plug_in": "The expert layer in a model of yours: [plug_in.md](plug_in.md).",
    "foreroute.engine.convert": "Experts from a dense feed-forward: [convert.md](convert.md).",
    "foreroute.kernels": "Operations on tensors, usable alone: [kernels.md](kernels.md).",
    "foreroute.engine.moe.layer": "The layer itself, which takes a Routing made by hand as well.",
    "foreroute.engine.routing.plan": "What is known about routing before a layer runs.",
    "foreroute.engine.routing.planned_router": "Routers that choose before the batch arrives, and what a method says.",
    "foreroute.engine.routing.row_sets": "The experts of each row, and their weights.",
    "foreroute.engine.routing.live_router": "Routers that choose inside the forward pass, and what a method says.",
    "foreroute.engine.routing.methods": "Methods by name.",
    "foreroute.engine.routing.method_options": "A method's own options, and its card.",
    "foreroute.engine.routing.plans.planner": "From a planned router's choice to a Plan, for one rank of a group.",
    "foreroute.engine.routing.tables": "The map from n-grams to orderings of the experts.",
    "foreroute.engine.evaluation.table_balance": "Load and traffic of a table, counted.",
    "foreroute.engine.routing.k_schedule": "How k changes over training.",
    "foreroute.engine.routing.plans.padding": "Plans of equal shapes, for graphs: [certificate.md](certificate.md).",
}
"""The modules whose names are public, and a line about each."""
INTRO = """# API

What may be imported, with what each name says of itself; whole docstrings, with shapes, units and errors, are at the
links. Names that are not here may change without a word. Until version 1.0 these may change too, and CHANGELOG.md says
so. This page is written by `python docs/api.py`, and a test compares it with the code."""


def public_names(module: ModuleType) -> list[str]:
    """Return the names in a module's __all__, or without one those of classes and functions that it defines."""
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return [name for name in listed if not name.startswith("__")]
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__ and callable(value)
    ]


def page() -> str:
    """Return the text of the page."""
    parts = [INTRO]
    for name, about in MODULES.items():
        module = import_module(name)
        rows = [_row(public, getattr(module, public)) for public in public_names(module)]
        parts.append("\n".join([f"## {name}", "", about, "", "| name | what |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _row(name: str, value: Any) -> str:
    paragraph = (inspect.getdoc(value) or "").partition("\n\n")[0]
    sentence = re.split(r"(?<=[^.]\.)\s+(?=[A-Z`])", " ".join(paragraph.split()), maxsplit=1)[0]
    sentence = sentence.removesuffix(":").replace("|", "\\|")
    source = Path(inspect.getsourcefile(inspect.unwrap(value)) or "").resolve()
    return f"| [`{name}`]({os.path.relpath(source, HERE)}) | {sentence} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
