"""`moe.router=by_frequency`: numbers of experts by how often the training text has a row, k of them on average.

A row that the text uses u times has experts in proportion to u ** power, rounded by Webster's method of apportionment
(Balinski and Young 1982, "Fair Representation"): choice c, from 0, comes at (c + 1/2) / u ** power, and for each k the
lowest of these are taken until the mean over the text is k. power < 0 gives frequent n-grams fewer experts and rare
ones more, power > 0 the other way round; 0 is `hashed`. Rows that the text does not have use k. Ours: a control beside
`top_p` of what the choice of the number is worth, and for those whose text is dominated by easy, frequent n-grams.

Numbers that depend on the frequency have another mean on other text, where other rows are frequent: with 16 experts,
trigrams of the first 4 MB of enwik8 and k = 2 the mean on the last tenth is 0.6% above k at the default power, 1.5%
above it at -0.25, 0.5% below it at 0.5. Far above 0 the load is less even, since rare rows have no choices left that
could even it out: busiest expert / mean is 1.012 at power 0.5, k = 2 and bigrams.

`counts_file` has numbers of the user's own, of any origin, in the place of u ** power: each n-gram's row has experts in
proportion to its number; exactly so many where their mean over the text is k. With experts without rows as in `top_p`.

Letters: r rows, E columns.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from foreroute.engine.config import MoEConfig
from foreroute.engine.config.option import option
from foreroute.engine.errors import UserError, require
from foreroute.engine.routing.method_options import Card, read_options
from foreroute.engine.routing.planned.hashed import HashedRouter
from foreroute.engine.routing.planned_router import RouterInputs
from foreroute.engine.routing.row_counts import CountRule, Value, Values

_UNIT = 2.0**32  # of a logarithm to base 2 in whole numbers
_MOST = 2.0**16  # above every value but that of a number 0


@dataclass
class Options:
    """Options of moe.router=by_frequency."""

    power: float = option(
        -0.125, "Experts are in proportion to uses ** power; below 0, frequent rows have fewer.", at_least=-1, at_most=1
    )
    least: int = option(1, "Experts that every row has, 0 or 1.", at_least=0, at_most=1)
    counts_file: str | None = option(
        None, "A file of NumPy's, whole numbers [moe.rows]: experts are in proportion to them instead."
    )


class ByFrequencyRouter(HashedRouter):
    """The router of a table whose rows have numbers of experts by their frequency."""

    card = Card(
        "experts of a hashed row in proportion to a power of its frequency, or to numbers from a file, k on average",
        "ours; rounded by Webster's method of apportionment",
        "as hashed at equal k; certificate exact",
        "frequent n-grams that shall cost less, or more; numbers of experts found elsewhere",
    )

    at_most_k = False
    uses = (*HashedRouter.uses, "options")

    @classmethod
    def count_rule(cls, moe: MoEConfig, inputs: RouterInputs) -> CountRule:
        """Return the rule by frequency or file."""
        options = read_options(moe, Options)
        if options.counts_file is None:
            return CountRule(("by_frequency", options.least, options.power), powers(options.power), options.least)
        require(
            inputs.vocab_size**moe.ngram <= moe.rows,
            f"moe.options.counts_file with moe.ngram={moe.ngram}: needs a row of its own for each n-gram, at least"
            f" {inputs.vocab_size**moe.ngram}, moe.rows={moe.rows}",
        )
        count_r = read_counts(options.counts_file, moe)
        digest = hashlib.sha256(count_r.tobytes()).hexdigest()
        return CountRule(("counts_file", options.least, digest), proportions(count_r), options.least, unseen=True)


def powers(power: float) -> Value:
    """Return the values for experts in proportion to uses ** power."""

    def value(row_s: NDArray[np.int64], logit_sE: NDArray[np.float64], use_s: NDArray[np.int64]) -> Values:
        return _webster(power * np.log2(use_s), logit_sE.shape[1])

    return value


def proportions(count_r: NDArray[np.int64]) -> Value:
    """Return the values for experts in proportion to the numbers of all rows."""

    def value(row_s: NDArray[np.int64], logit_sE: NDArray[np.float64], use_s: NDArray[np.int64]) -> Values:
        with np.errstate(divide="ignore"):  # 0 has the logarithm -inf, and no expert before all others have theirs
            return _webster(np.log2(count_r[row_s]), logit_sE.shape[1])

    return value


def _webster(log_weight_s: NDArray[np.float64], choices: int) -> Values:
    value_sE = np.log2(np.arange(choices) + 0.5) - log_weight_s[:, None]
    whole_sE: Values = np.rint(_UNIT * np.minimum(value_sE, _MOST)).astype(np.int64)
    return whole_sE


def read_counts(path: str, moe: MoEConfig) -> NDArray[np.int64]:
    """Read the numbers of experts of all rows.

    Raises:
        UserError: there is no such file, or it is of another kind or shape, or a number is out of range.
    """
    name = f"moe.options.counts_file={path}"
    try:
        count_r = np.load(Path(path), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{name}: cannot be read as a file of NumPy's ({error})") from error
    fits = isinstance(count_r, np.ndarray) and count_r.dtype.kind in "iu" and count_r.shape == (moe.rows,)
    require(fits, f"{name}: must be whole numbers of shape [moe.rows={moe.rows}]")
    bad = count_r[(count_r < 0) | (count_r > moe.columns)]
    require(not bad.size, f"{name}: has {bad[0] if bad.size else None}: must be in 0 .. {moe.columns}")
    found: NDArray[np.int64] = count_r.astype(np.int64)
    return found


ROUTER = ByFrequencyRouter
