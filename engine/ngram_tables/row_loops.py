"""The update of table rows by Adam in one pass over each row, in the memory where they lie, on a CPU.

PyTorch's operators (RowAdam.updated in engine/ngram_tables/row_rules.py) copy the rows out and back and pass over them
a dozen times. The numbers are equal but for rounding.

Letters: L rows of the table here, U distinct rows of a step, W width of a row, V second moments of a row (W or 1).
"""

import math
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreroute.engine.routing.loops import compiled


@partial(compiled, error_model="numpy")
def adam_rows(
    value_LW: NDArray[Any],
    mean_LW: NDArray[Any],
    square_LV: NDArray[Any],
    count_L1: NDArray[Any],
    local_U: NDArray[Any],
    grad_UW: NDArray[Any],
    numbers: NDArray[Any],
    step: int,
    log_beta1: float,
    log_beta2: float,
    lr: float,
) -> None:
    """Change the rows local_U and their state in place.

    Args:
        count_L1: updates of each row, which correct its bias; with no rows the step's number does.
        numbers: beta1, 1 - beta1, beta2, 1 - beta2, eps, W and 0 in the type of the values: others would be computed
            with in fp64.
        step: number of this update.
    """
    width, by_count, by_element = value_LW.shape[1], count_L1.shape[0] > 0, square_LV.shape[1] == value_LW.shape[1]
    beta1, rest1, beta2, rest2, eps = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]
    factors = np.empty(2, numbers.dtype)
    first, second = -math.expm1(step * log_beta1), -math.expm1(step * log_beta2)
    for number in range(local_U.size):
        row = local_U[number]
        if by_count:
            count_L1[row, 0] += 1
            first = -math.expm1(count_L1[row, 0] * log_beta1)
            second = -math.expm1(count_L1[row, 0] * log_beta2)
        factors[0], factors[1] = lr / first, 1.0 / math.sqrt(second)
        rate, scale = factors[0], factors[1]
        shift = eps if by_count else eps * scale
        if by_element:
            for column in range(width):
                grad = grad_UW[number, column]
                mean = mean_LW[row, column] * beta1 + grad * rest1
                square = square_LV[row, column] * beta2 + grad * grad * rest2
                mean_LW[row, column], square_LV[row, column] = mean, square
                value_LW[row, column] -= rate * mean / (math.sqrt(square) * scale + shift)
        else:
            total = numbers[6]
            for column in range(width):
                total += grad_UW[number, column] * grad_UW[number, column]
            square = square_LV[row, 0] * beta2 + total / numbers[5] * rest2
            square_LV[row, 0] = square
            rate = rate / (math.sqrt(square) * scale + shift)
            for column in range(width):
                mean = mean_LW[row, column] * beta1 + grad_UW[number, column] * rest1
                mean_LW[row, column] = mean
                value_LW[row, column] -= rate * mean
