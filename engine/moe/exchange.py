"""The exchange: moves rows to the ranks that hold their experts and back. So far one rank, so nothing moves.

`dispatch` gives the rows that this rank's experts read (the Plan's received rows); `combine` takes one partial result
per received row and gives one row per local token. The many-rank forms (`tokens`, `gather`) will stand beside `Local`
with the same two methods.
"""

from torch import Tensor

from engine.moe.plan import Plan


class Local:
    """Exchange of a one-rank expert group: no collective, no copy, zero bytes."""

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Tensor:
        """Return the received rows [R, D], here the tokens themselves."""
        if x_TD.shape[0] != plan.send_splits[0]:
            raise ValueError(
                f"x_TD has {x_TD.shape[0]} rows: the plan is for {plan.send_splits[0]} tokens"
            )
        return x_TD

    def combine(self, partial_RD: Tensor, plan: Plan) -> Tensor:
        """Return the output rows [T, D], here the partial results themselves."""
        return partial_RD
