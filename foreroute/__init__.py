"""Expert-parallel training for routing that is known ahead.

engine/, kernels/, launch/ and conf/ of the checkout lie here as links: everything is imported as foreroute.engine... A
name below is loaded when it is asked for, for PyTorch must come after what launch/__init__.py sets, and a check of the
kernels needs no DeepSpeed.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.2.0"

# A checkout that was unpacked without its links.
if not Path(__file__).with_name("engine").is_dir():
    __path__.append(str(Path(__file__).resolve().parents[1]))

_PUBLIC = {
    "MoEConfig": "foreroute.engine.config",
    "ParallelConfig": "foreroute.engine.config",
    "experts_of": "foreroute.engine.plug_in",
    "moe_ffn": "foreroute.kernels",
    "parameter_groups": "foreroute.engine.plug_in",
    "replace_feed_forwards": "foreroute.engine.plug_in",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'foreroute' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
