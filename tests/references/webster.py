"""Webster's method of apportionment (Balinski and Young 1982, Fair Representation), in plain loops of whole numbers."""

from collections.abc import Sequence
from fractions import Fraction


def shares(weights: Sequence[Fraction], divisor: Fraction) -> list[int]:
    """Return each weight divided by the divisor, rounded to the nearest whole number; halves are rounded up."""
    return [int(weight / divisor + Fraction(1, 2)) for weight in weights]
