"""A converted model of transformers on disk: written once, opened by any program without the conversion's inputs.

    save_pretrained(model, folder, weights_only=True)      # every rank (engine/plug_in/saved/pretrained.py)
    model, experts = open_converted(folder)                # every rank of another run

The model's own configuration, which the folder has too, says in its entry `foreroute` how the model was converted. So
the same layers are made again and loaded. Nothing is clustered and no table is built when a folder is opened.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from foreroute.engine.config import Builder, MoEConfig
from foreroute.engine.convert import Adapters, Copies, Slices
from foreroute.engine.errors import require
from foreroute.engine.hugging_face.dense_models import NOTED, AnyStart, convert_model
from foreroute.engine.plug_in import load_pretrained
from foreroute.engine.plug_in.planned_experts import PlannedExperts
from foreroute.engine.routing.planned.token_table import write_tables

STARTS: dict[str, type[AnyStart]] = {kind.kind: kind for kind in (Copies, Slices, Adapters)}
"""Ways to convert, by their names on the command line and on disk."""

_EARLIER: dict[str, dict[str, Any]] = {"adapters": {"router_reads_input": False}}
"""Options that folders of earlier versions do not name."""


def open_dense(folder: Path | str) -> Any:
    """Read a dense model of transformers, of the class that its configuration names.

    Raises:
        UserError: the folder holds no model of transformers.
    """
    config = _config(folder)
    kind = getattr(transformers, (config.architectures or ["AutoModel"])[0])
    return kind.from_pretrained(folder)


def open_converted(folder: Path | str, **options: Any) -> tuple[Any, PlannedExperts]:
    """Read a converted model; return it and its expert layers.

    With experts sharded (`parallel`) make the model, let DeepSpeed take it, and load_pretrained(engine, folder) again.

    Args:
        options: of replace_feed_forwards, such as parallel, kernels and dropout.

    Raises:
        UserError: the folder holds no converted model, or is damaged.
    """
    config = _config(folder)
    noted = getattr(config, NOTED, None)
    require(isinstance(noted, dict), f"{folder}: is no converted model: its config.json has no entry {NOTED}")
    assert isinstance(noted, dict)
    model = getattr(transformers, config.architectures[0])(config)
    start = STARTS[noted["start"]](**{**_EARLIER.get(noted["start"], {}), **noted["options"]})
    start = replace(start, rounds=0) if isinstance(start, Slices) else start
    moe = MoEConfig(**{**noted["moe"], "builder": Builder.random, "pack": None})
    with tempfile.TemporaryDirectory() as place:
        if moe.router == "token_table":
            rows, layers = model.get_input_embeddings().weight.shape[0], config.num_hidden_layers
            moe.options = {"file": f"{place}/any.npy"}
            write_tables(Path(moe.options["file"]), [torch.arange(moe.experts).repeat(rows, 1)] * layers)
        experts = convert_model(model, start, moe=moe, k=noted["k"], **options)
    load_pretrained(model, folder, weights_only=True)
    return model.eval(), experts


def _config(folder: Path | str) -> Any:
    require((Path(folder) / "config.json").is_file(), f"{folder}: has no config.json: must be a model of transformers")
    return transformers.AutoConfig.from_pretrained(folder)
