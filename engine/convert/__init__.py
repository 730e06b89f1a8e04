"""From a dense feed-forward to experts: copies of it, slices of it, adapters after it. Import from here."""

from foreroute.engine.convert.adapters import Adapters
from foreroute.engine.convert.copies import Copies
from foreroute.engine.convert.selection import plan_slices, train_slice_routers
from foreroute.engine.convert.split import Slices
from foreroute.engine.convert.start import Start

__all__ = ["Adapters", "Copies", "Slices", "Start", "plan_slices", "train_slice_routers"]
