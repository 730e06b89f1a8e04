"""Adam on the rows of a table that a step used, one number at a time in plain Python, by the published formulas."""

import math


def adam_row(value, gradients, *, lr, beta1, beta2, eps, steps=None, one_moment=False):
    """Return a row after updates with these gradients (lists of numbers).

    Args:
        lr: of each update.
        steps: the number that corrects the bias of each update; None: 1, 2, 3, ... as torch.optim.Adam. With numbers
            eps is added before the correction, as in torch.optim.SparseAdam.
        one_moment: one second moment for the row, of the mean of squares.
    """
    value, first, second = list(value), [0.0] * len(value), [0.0] * len(value)
    for number, gradient in enumerate(gradients):
        n = number + 1 if steps is None else steps[number]
        squares = [g * g for g in gradient]
        if one_moment:
            squares = [sum(squares) / len(squares)] * len(squares)
        for i, g in enumerate(gradient):
            first[i] = beta1 * first[i] + (1 - beta1) * g
            second[i] = beta2 * second[i] + (1 - beta2) * squares[i]
            mean = first[i] / (1 - beta1**n)
            if steps is None:
                value[i] -= lr[number] * mean / (math.sqrt(second[i] / (1 - beta2**n)) + eps)
            else:
                value[i] -= lr[number] * mean * math.sqrt(1 - beta2**n) / (math.sqrt(second[i]) + eps)
    return value
