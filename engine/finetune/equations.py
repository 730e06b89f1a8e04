"""Word problems, each with an equation, in the file format of SVAMP (arXiv 2103.07191), also of its ASDiv-A and MAWPS.

A file is a CSV. Numbers of the question stand in it as number0, number1, .. and in the column Numbers with blanks
between; Equation is in prefix notation, Answer its value:

    ann has number0 pens and buys number1 .     3 4     + number0 number1     7.0
"""

import csv
import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from foreroute.engine.errors import UserError, require

COLUMNS = ("Question", "Numbers", "Equation", "Answer")
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
TOLERANCE = 1e-4
"""The largest difference between the value of an equation and the answer that it gives."""
MOST_SYMBOLS = 16
"""Of an equation; the longest of ASDiv-A, MAWPS and SVAMP have 15."""

_SLOT = re.compile(r"number([0-9]+)")


@dataclass(frozen=True, slots=True)
class Problem:
    """A question about numbers."""

    text: str  # with number0, number1, .. in place of the numbers
    numbers: tuple[float, ...]
    equation: tuple[str, ...]  # symbols in prefix order; it has a value
    answer: float

    def is_solved_by(self, equation: Sequence[str]) -> bool:
        """Return whether the value of an equation is the answer; a malformed one has none."""
        value = value_of(equation, self.numbers)
        return value is not None and abs(value - self.answer) <= TOLERANCE


def slot(number: int) -> str:
    """Return the word that stands for a number."""
    return f"number{number}"


def number_of(symbol: str) -> int | None:
    """Return which number of the question a symbol is; None for an operator or a constant."""
    found = _SLOT.fullmatch(symbol)
    return None if found is None else int(found[1])


def value_of(equation: Sequence[str], numbers: Sequence[float]) -> float | None:
    """Compute a prefix equation.

    Example: ("-", "*", "number1", "2", "number0") with (3, 4) is 4 * 2 - 3 = 5.

    Returns:
        None where there is no finite value: too few or too many symbols, an unknown symbol, a number that the question
        lacks, or a division by 0.
    """
    stack: list[float] = []
    try:
        for symbol in reversed(equation):
            if symbol in OPERATORS:
                left, right = stack.pop(), stack.pop()
                stack.append(OPERATORS[symbol](left, right))
            else:
                number = number_of(symbol)
                stack.append(float(symbol) if number is None else numbers[number])
        (value,) = stack
    except (ArithmeticError, IndexError, ValueError):
        return None
    return value if math.isfinite(value) else None


def read_problems(path: Path) -> list[Problem]:
    """Read all problems of a file.

    Raises:
        UserError: no such file, or the first line that is not as it must be.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for name in COLUMNS:
                require(name in (reader.fieldnames or ()), f"{path}: has no column {name}, it must be as SVAMP's")
            found = [_problem(row, f"{path}, line {reader.line_num}") for row in reader]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 (byte {error.start})") from error
    except csv.Error as error:
        raise UserError(f"{path}: is no CSV ({error})") from error
    require(len(found) > 0, f"{path}: holds no problems")
    return found


def _problem(row: dict[str, str | None], place: str) -> Problem:
    text, numbers, equation, answer = ((row[name] or "").strip() for name in COLUMNS)
    require(bool(text), f"{place}: Question is empty")
    values = tuple(_number(word, f"{place}: Numbers") for word in numbers.split())
    symbols = tuple(equation.split())
    require(
        len(symbols) <= MOST_SYMBOLS,
        f"{place}: Equation has {len(symbols)} symbols, it must have {MOST_SYMBOLS} or fewer",
    )
    of = f"{place}: Equation is {equation!a}, it must be in prefix notation and have a value with Numbers {numbers}"
    require(value_of(symbols, values) is not None, of)
    return Problem(text, values, symbols, _number(answer, f"{place}: Answer"))


def _number(word: str, place: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    require(math.isfinite(value), f"{place}: is {word!a}, it must be a number")
    return value
