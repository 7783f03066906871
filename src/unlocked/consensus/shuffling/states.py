"""Which of an optimizer's tensors belong to a parameter entry by entry, so that they can move with its scalars (WASH+Opt).

They are those of the parameter's shape: momentum, Adam's moments and its largest second moment, RMSprop's and Adagrad's sums,
Adadelta's, Adamax's, NAdam's, RAdam's, ASGD's average, Rprop's step sizes, Muon's momentum. What has another shape stays:
counts of steps, and Adafactor's sums over rows and columns, which belong to no single entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

_OF_THE_WHOLE = frozenset(
    {"step", "mu_product", "eta", "mu"}
)  # torch's own scalars, which have the shape of a scalar weight


def elementwise_states(optimizer: torch.optim.Optimizer, parameter: Tensor) -> list[Tensor]:
    """The state tensors of the parameter's shape, by name; none where the optimizer has not stepped it yet."""
    state = optimizer.state.get(parameter, {})
    return [
        state[name]
        for name in sorted(state, key=str)
        if name not in _OF_THE_WHOLE and isinstance(state[name], Tensor) and state[name].shape == parameter.shape
    ]
