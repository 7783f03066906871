"""The layerwise ensemble: what all heads of a network say, together (Patel 2023, §3.2.4, Eq. 2; Belilovsky et al. 2019).

    l = Σ_k α_k · mean_g softmax(z_{kg})        α_k = 2^k / Σ_i 2^i

z_{kg} logits of group g at depth k = 1 … K, of those depths that have heads; the network's own output is the last of them. Eq.
2 divides by K·G besides, which changes no decision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def depth_weights(count: int) -> list[float]:
    """α_1 … α_K: each depth counts twice as much as the one below; they sum to 1."""
    total = 2.0 ** (count + 1) - 2.0
    return [2.0**k / total for k in range(1, count + 1)]


def layerwise(probabilities: Mapping[int, Sequence[Tensor]]) -> Tensor:
    """The mixture (B, K) of the probabilities (B, K) of each depth's groups, by depth."""
    weights = depth_weights(len(probabilities))
    means = [torch.stack(list(rows)).mean(0) for _, rows in sorted(probabilities.items())]
    return torch.stack([weight * mean for weight, mean in zip(weights, means)]).sum(0)
