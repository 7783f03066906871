"""The thesis' accuracies in %, CIFAR-10, full width and size (F Tables 4.2 to 4.6, 4.9, B.4 and B.5)."""

from __future__ import annotations

from .cases import Case

E2E = {8: 94.5, 16: 94.3}
# (target, guess, head) → 8 stages, activity and weight; 16 stages, activity and weight
PAIRS: dict[tuple[str, str, str], tuple[float | None, ...]] = {
    ("global", "local", "cnn"): (90.4, 92.0, 79.0, 88.0),
    ("global", "local", "mlp"): (89.2, 91.6, 84.7, 88.7),
    ("global", "local", "linear"): (65.9, 88.9, 46.7, 86.1),
    ("global", "ntk", "cnn"): (55.2, 66.8, 37.7, 50.1),
    ("global", "ntk", "mlp"): (61.6, 63.1, 50.3, 49.7),
    ("global", "ntk", "linear"): (61.6, 62.6, 49.9, 48.3),
    ("global", "gaussian", ""): (None, None, 38.9, 50.0),  # Table 4.3 has no row for random guesses
    ("global", "rademacher", ""): (None, None, 38.0, 49.8),
    ("global", "fixed-ntk", "cnn"): (51.2, 57.2, 27.5, 45.1),
    ("global", "fixed-ntk", "mlp"): (52.3, 64.6, 40.2, 45.5),
    ("global", "fixed-ntk", "linear"): (57.7, 76.4, 36.9, 60.5),
    ("global", "local", "predsim"): (84.0, 89.8, 64.8, 85.3),
    ("local", "gaussian", "cnn"): (41.2, 52.1, 23.5, 37.5),
    ("local", "gaussian", "mlp"): (45.6, 53.2, 21.5, 39.7),
    ("local", "gaussian", "linear"): (36.9, 56.5, 23.8, 43.5),
    ("intermediate", "local", "cnn"): (91.6, 91.6, 80.0, 87.8),
    ("intermediate", "local", "mlp"): (91.5, 91.8, 87.6, 89.5),
    ("intermediate", "local", "linear"): (76.3, 89.6, 59.8, 86.9),
    ("intermediate", "ntk", "cnn"): (55.7, 60.0, 33.0, 18.4),
    ("intermediate", "ntk", "mlp"): (57.4, 52.5, 40.7, 20.1),
    ("intermediate", "ntk", "linear"): (55.3, 44.2, 32.4, 20.3),
    ("intermediate", "gaussian", "cnn"): (45.3, 51.5, 28.0, 47.1),
    ("intermediate", "gaussian", "mlp"): (53.7, 53.2, 31.4, 48.0),
    ("intermediate", "gaussian", "linear"): (51.4, 53.9, 42.5, 46.4),
    ("intermediate", "rademacher", "cnn"): (43.8, 51.6, 24.8, 47.5),
    ("intermediate", "rademacher", "mlp"): (54.7, 52.9, 30.4, 49.5),
    ("intermediate", "rademacher", "linear"): (49.0, 54.2, 43.6, 45.6),
    ("local", "rademacher", "cnn"): (39.0, 53.0, None, None),
    ("local", "rademacher", "mlp"): (43.6, 53.3, None, None),
    ("local", "rademacher", "linear"): (34.6, 56.6, None, None),
}
LOCAL_LEARNING = {"cnn": (92.0, 87.7), "mlp": (92.1, 89.4), "linear": (89.2, 86.7), "predsim": (89.2, 86.8)}
SUBSPACE = {"cnn": (92.3, 89.6), "mlp": (89.6, 77.9), "linear": (84.0, 73.4)}
WIDER = {  # factor of the width → activity, weight; Table 4.9, 16 stages
    ("local", "mlp", 0.5): (None, 79.1),
    ("local", "mlp", 2.0): (86.2, 84.1),
    ("local", "mlp", 4.0): (87.0, 91.7),
    ("gaussian", "", 0.5): (38.9, 49.6),
    ("gaussian", "", 2.0): (36.2, 48.9),
    ("gaussian", "", 4.0): (29.6, 48.7),
}


def published(case: Case) -> float | None:
    """The thesis' number for this row, or None where it has none (or the text we have lost it)."""
    split = 0 if case.stages == 8 else 1
    if case.target == "end to end":
        return E2E[case.stages]
    if case.guess == "itself":
        return LOCAL_LEARNING[case.head][split]
    if case.variant:
        return SUBSPACE[case.head][split] if case.variant == "subspace" else None
    space = 0 if case.space == "activity" else 1
    if case.width != 1:
        return WIDER[case.guess, case.head, case.width][space] if case.stages == 16 else None
    row = PAIRS.get((case.target, case.guess, case.head))
    return None if row is None else row[2 * split + space]
