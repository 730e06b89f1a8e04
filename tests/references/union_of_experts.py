"""A feed-forward by plain loops over its hidden units, all of them or some.

Letters: T tokens, D width.
"""

import torch


def feed_forward(x_TD, w1, b1, w2, b2, units=None):
    rows = []
    for x_D in x_TD:
        y_D = b2.clone()
        for unit in range(len(b1)) if units is None else units:
            y_D = y_D + torch.relu(w1[unit] @ x_D + b1[unit]) * w2[unit]
        rows.append(y_D)
    return torch.stack(rows)
