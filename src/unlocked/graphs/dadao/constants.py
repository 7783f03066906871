"""DADAO's constants, its flow between events, and the bound of its theorem.

    ν = μ/2,  r = √(ν/L)
    flow:     η = η̃ = α̃ = r/8,  α = r/4,  θ = 1/(2r)
    gradient: γ = 1/(4L),  γ̃ = 1/(4√(Lν)),  δ = r/4,  δ̃ = 1
    edge:     β = 1/2,  β̃ = 2χ₁*/r

χ₁*, χ₂* the worst over time of the graph's constants (`spectra`: χ₂ with the ½), in a unit of time in which a node computes
one gradient on average. The theorem needs 2χ₁*χ₂* ≤ 1. Since both scale as 1/rates, the least rates that do are the given ones
times √(2χ₁*χ₂*): in total √(2χ₁χ₂) communications per gradient of a node, χ's of rates that sum to one.

Source: Nabli & Oyallon (2023); the constants are those of the authors' experiments. Theorem 5.3.1 of Oyallon says only that
some exist; at 2χ₁χ₂ = 1 its bound is C ‖x_0 − x*‖² e^{−t √(μ/L)/16} with our χ₂, and √2 slower in the exponent with Eq. 5.10's,
which lacks the ½. `bound` is the sharper of the two. The exact second moments (`moments`) say: for these constants it holds, by
a factor of 2 in the exponent; at 0.7 of the least rates they diverge; above the least rates nothing gets faster. So the
theorem's ∝ 1/√(χ₁χ₂) is not for 2χ₁χ₂ < 1: read literally it would promise any speed at one gradient per unit of time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import exp, sqrt

import numpy as np

from ..graph import Floats

X, X_TILDE, Y, Y_TILDE, Z, Z_TILDE = range(6)


@dataclass(frozen=True)
class Constants:
    """From μ, L and χ₁*; letters as in the module's text."""

    mu: float
    L: float
    chi1: float

    @property
    def nu(self) -> float:
        """ν."""
        return self.mu / 2

    @property
    def root(self) -> float:
        """r = √(ν/L)."""
        return sqrt(self.nu / self.L)

    @property
    def theta(self) -> float:
        """θ."""
        return 1 / (2 * self.root)

    @cached_property
    def gradient_jump(self) -> Floats:
        """(6,): what a gradient event adds to the six variables, per unit of g = ∇f_i(x) − νx − ỹ."""
        jump = np.zeros(6)
        jump[X], jump[X_TILDE] = -1 / (4 * self.L), -1 / (4 * sqrt(self.L * self.nu))
        jump[Y_TILDE] = self.root / 4 + 1
        return jump

    @cached_property
    def edge_jump(self) -> Floats:
        """(6,): what an edge event adds at i, and takes off at j, per unit of m = (y + z)_i − (y + z)_j."""
        jump = np.zeros(6)
        jump[Z], jump[Z_TILDE] = -1 / 2, -2 * self.chi1 / self.root
        return jump

    @cached_property
    def drift(self) -> Floats:
        """(6, 6): M of the flow ds/dt = M s, s = (x, x̃, y, ỹ, z, z̃)."""
        eta, alpha, alpha_tilde, theta = self.root / 8, self.root / 4, self.root / 8, self.theta
        matrix = np.zeros((6, 6))
        matrix[X, [X, X_TILDE]] = -eta, eta
        matrix[X_TILDE, [X, X_TILDE]] = eta, -eta
        matrix[Y, [Y, Y_TILDE]] = -alpha, alpha
        matrix[Y_TILDE, [Y, Z, X_TILDE]] = -theta, -theta, -theta * self.nu
        matrix[Z, [Z, Z_TILDE]] = -alpha, alpha
        matrix[Z_TILDE, [Z, Z_TILDE]] = alpha_tilde, -alpha_tilde
        return matrix

    @cached_property
    def _modes(self) -> tuple[Floats, float, Floats]:
        """The three real rates of decay, the frequency ω, and (5, 36) what each mode contributes to e^{Mt}.

        M is triangular by blocks: (x, x̃) has the eigenvalues 0 and −2η, (z, z̃) 0 and −(α+α̃), and what they do to (y, ỹ) comes
        on top of its own e^{Bt}, B = [[−α, α], [−θ, 0]], eigenvalues −α/2 ± iω. In closed form: 0 is twice an eigenvalue, of
        which numerical eigenvectors may be nearly parallel.
        """
        eta, alpha, alpha_tilde, theta = self.root / 8, self.root / 4, self.root / 8, self.theta
        own = np.array([[-alpha, alpha], [-theta, 0.0]])
        omega = sqrt(alpha * theta - alpha**2 / 4)
        rates = np.array([0.0, -2 * eta, -(alpha + alpha_tilde)])
        parts = np.zeros((5, 6, 6))
        parts[0, : X_TILDE + 1, : X_TILDE + 1] = 0.5
        parts[1, : X_TILDE + 1, : X_TILDE + 1] = [[0.5, -0.5], [-0.5, 0.5]]
        parts[0, Z:, Z:] = np.array([[alpha_tilde, alpha]] * 2) / (alpha + alpha_tilde)
        parts[2, Z:, Z:] = np.eye(2) - parts[0, Z:, Z:]
        parts[3, [Y, Y_TILDE], [Y, Y_TILDE]] = 1.0
        for k, rate in enumerate(rates):
            forced = np.linalg.solve(rate * np.eye(2) - own, [0.0, -theta])
            parts[k, Y : Y_TILDE + 1] = np.outer(forced, self.nu * parts[k, X_TILDE] + parts[k, Z])
            parts[3, Y : Y_TILDE + 1] -= parts[k, Y : Y_TILDE + 1]
        parts[4, Y : Y_TILDE + 1] = (own + alpha / 2 * np.eye(2)) / omega @ parts[3, Y : Y_TILDE + 1]
        return rates, omega, parts.reshape(5, 36)

    def flow(self, times: Floats) -> Floats:
        """(…, 6, 6): e^{Mt} for each time of (…)."""
        rates, omega, parts = self._modes
        modes = np.empty((*np.shape(times), 5))
        modes[..., :3] = np.exp(np.multiply.outer(times, rates))
        size = np.exp(-self.root / 8 * times)
        modes[..., 3], modes[..., 4] = size * np.cos(omega * times), size * np.sin(omega * times)
        return (modes @ parts).reshape(*np.shape(times), 6, 6)


def least_factor(chi1: float, chi2: float) -> float:
    """√(2χ₁χ₂): by what all rates must be multiplied at least for the theorem; 1 for a single node."""
    return sqrt(2 * chi1 * chi2) if chi1 else 1.0


def rate(condition: float, chi1: float = sqrt(0.5), chi2: float = sqrt(0.5)) -> float:
    """Theorem 5.3.1's exponent per unit of time, √(μ/L)/(16√2 √(χ₁χ₂)), at most what it is at 2χ₁χ₂ = 1 (the default)."""
    return 1 / (16 * sqrt(condition) * max(1.0, least_factor(chi1, chi2)))


def bound(condition: float, time: float) -> float:
    """Theorem 5.3.1's bound on E‖x_t − x*‖² / ‖x_0 − x*‖² for 2χ₁χ₂ ≤ 1."""
    return (1 / 2 + 23 / 8 * condition + 2 * condition**2) * exp(-rate(condition) * time)
