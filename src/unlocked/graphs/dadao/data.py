"""Problems from data that are there without a download: scikit-learn's diabetes and digits, and synthetic ones.

Samples are standardised (over all nodes), given a constant feature, shuffled by the seed, and dealt out to the nodes, m = ⌊N/n⌋
each; the rest is left out. `unlike`: sorted by target first, so that every node has another kind of data. The ridge is the one
that makes the condition number L/μ the one asked for.
"""

from __future__ import annotations

import numpy as np

from ...errors import InvalidChoice
from ..graph import Floats
from .problems import Logistic, Ridge, largest, smallest


def diabetes(n: int, condition: float = 50.0, seed: int = 0, unlike: bool = False) -> Ridge:
    """Ridge regression on the diabetes set: 442 patients, 10 features, n ≤ 442 nodes; the target is standardised.

    Raises InvalidChoice: more nodes than samples, a condition number that no ridge gives.
    """
    from sklearn.datasets import load_diabetes  # takes a second to import

    features, target = load_diabetes(return_X_y=True)
    A, b = _dealt(_standard(features), _standard(target[:, None])[:, 0], n, seed, unlike)
    return Ridge(A, b, _ridge(smallest(A), largest(A), condition), "ridge, diabetes")


def digits(
    n: int,
    condition: float = 50.0,
    *,
    digit: int | None = None,
    components: int = 16,
    seed: int = 0,
    unlike: bool = False,
) -> Logistic:
    """Logistic regression on the digits set: 1797 images of 64 pixels, n ≤ 1797 nodes.

    digit: this one against the rest; None: odd against even. components: principal components kept of the 64 pixels.

    Raises InvalidChoice: more nodes than samples, a digit or a number of components that there is not, a condition number ≤ 1.
    """
    from sklearn.datasets import load_digits  # takes a second to import

    if digit not in (None, *range(10)) or not 1 <= components <= 64:
        raise InvalidChoice(
            f"digit={digit}, components={components}: give a digit 0 to 9 or None, and 1 to 64 components."
        )
    images, labels = load_digits(return_X_y=True)
    sides = labels % 2 == 1 if digit is None else labels == digit
    centred = images - images.mean(axis=0)
    kept = centred @ np.linalg.svd(centred, full_matrices=False)[2][:components].T
    A, b = _dealt(_standard(kept), np.where(sides, 1.0, -1.0), n, seed, unlike)
    return Logistic(A, b, _ridge(0.0, largest(A) / 4, condition), "logistic, digits")


def synthetic_ridge(n: int, d: int = 5, samples: int = 10, condition: float = 10.0, seed: int = 0) -> Ridge:
    """Gaussian features of different sizes, targets of one x plus noise and a shift of each node, so that nodes disagree."""
    generator = np.random.default_rng(seed)
    A = generator.normal(size=(n, samples, d)) * np.geomspace(1.0, condition**-0.5, d)
    b = A @ generator.normal(size=d) + generator.normal(size=(n, samples)) + generator.normal(size=(n, 1))
    return Ridge(A, b, _ridge(smallest(A), largest(A), condition), "ridge, synthetic")


def synthetic_logistic(n: int, d: int = 5, samples: int = 10, condition: float = 10.0, seed: int = 0) -> Logistic:
    """Gaussian features, labels drawn from the logistic model of an x of each node, so that nodes disagree."""
    generator = np.random.default_rng(seed)
    A = generator.normal(size=(n, samples, d))
    true = generator.normal(size=d) + generator.normal(size=(n, d)) / 2
    b = np.where(np.matvec(A, true) + generator.logistic(size=(n, samples)) > 0, 1.0, -1.0)
    return Logistic(A, b, _ridge(0.0, largest(A) / 4, condition), "logistic, synthetic")


def _standard(columns: Floats) -> Floats:
    return np.asarray((columns - columns.mean(axis=0)) / columns.std(axis=0))


def _dealt(features: Floats, target: Floats, n: int, seed: int, unlike: bool) -> tuple[Floats, Floats]:
    """A (n, m, d + 1), b (n, m)."""
    if not 1 <= n <= len(target):
        raise InvalidChoice(f"{len(target)} samples cannot be dealt out to {n} nodes; give 1 to {len(target)} nodes.")
    order = np.random.default_rng(seed).permutation(len(target))
    if unlike:
        order = order[np.argsort(target[order], kind="stable")]
    kept = order[: len(target) // n * n].reshape(n, -1)
    rows = np.concatenate([features, np.ones((len(target), 1))], axis=1)
    return rows[kept], target[kept]


def _ridge(least: float, greatest: float, condition: float) -> float:
    """ρ ≥ 0 with (greatest + ρ)/(least + ρ) = condition."""
    if not condition > 1 or condition * least > greatest * (1 + 1e-12):
        allowed = greatest / least if least > 0 else float("inf")
        raise InvalidChoice(
            f"condition={condition:g} is not possible for these data; give a number above 1, at most {allowed:g}."
        )
    return max(0.0, (greatest - condition * least) / (condition - 1))
