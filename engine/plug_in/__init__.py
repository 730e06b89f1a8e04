"""Expert layers inside a model and training loop of the user's own. Import from here."""

from foreroute.engine.plug_in.losses import mean_over_ranks
from foreroute.engine.plug_in.planned_layer import PlannedFeedForward
from foreroute.engine.plug_in.replace import experts_of, parameter_groups, replace_feed_forwards
from foreroute.engine.plug_in.saved.pretrained import load_pretrained, save_pretrained

__all__ = [
    "PlannedFeedForward",
    "experts_of",
    "load_pretrained",
    "mean_over_ranks",
    "parameter_groups",
    "replace_feed_forwards",
    "save_pretrained",
]
