"""How far a network's confidence is from its accuracy.

    ECE = Σ_m |B_m| / n · |accuracy(B_m) − confidence(B_m)|        B_m: samples whose largest probability is in ((m−1)/M, m/M]
    probabilities softmax(z / T); T* = argmin_T NLL(z / T)

Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks" (2017), M = 15. Fournier's thesis, Table D.2, has the
ECE at the optimal temperature.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BINS = 15
COLDEST, HOTTEST = 1e-3, 1e3  # temperatures between which the optimum is looked for
HALVINGS = 40


def expected_calibration_error(logits: Tensor, targets: Tensor, temperature: float = 1.0, bins: int = BINS) -> float:
    """The ECE, in [0, 1], of logits (…, K) with classes (…), with `bins` bins of equal width."""
    rows, classes = logits.detach().flatten(0, -2).double() / temperature, targets.flatten()
    confidence, answer = rows.softmax(-1).max(-1)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=rows.device)
    place = torch.bucketize(confidence, edges[1:-1])  # right edges belong to their bin
    surplus = (answer == classes).double() - confidence
    sums = torch.zeros(bins, dtype=torch.float64, device=rows.device).index_add_(0, place, surplus)
    return float(sums.abs().sum() / len(rows))


def optimal_temperature(logits: Tensor, targets: Tensor) -> float:
    """The temperature in [0.001, 1000] at which the negative log-likelihood of logits (…, K), classes (…) is least.

    With β = 1/T the likelihood of softmax(βz) is concave in β, so the slope's sign tells on which side the optimum is:
    bisection in log β. Where no optimum exists (all answers right: T → 0; worse than chance: T → ∞) the bound is given.
    """
    rows, classes = logits.detach().flatten(0, -2).double(), targets.flatten()
    rows = rows - rows.amax(-1, keepdim=True)
    wanted = rows.gather(-1, classes[:, None]).mean()

    def slope(log_beta: float) -> float:
        """d NLL / dβ = E[Σ_k p_k z_k] − E[z_y]"""
        p = (math.exp(log_beta) * rows).softmax(-1)
        return float(torch.where(p > 0, p * rows, 0).sum(-1).mean() - wanted)  # 0 · −∞ is 0: a class that is masked out

    low, high = -math.log(HOTTEST), -math.log(COLDEST)
    if slope(low) >= 0:
        return HOTTEST
    if slope(high) <= 0:
        return COLDEST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return math.exp(-(low + high) / 2)
