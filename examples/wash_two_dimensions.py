"""Two points on a function with two local minima and a global one: Fournier's Figure 6.3 (appendix D.1).

    python examples/wash_two_dimensions.py [--seeds 20] [--noise 0.1] [--to wash_two_dimensions.png]

    f(x, y) = −10 g(10, 10; 0.1) − 5 g(8, 3; 0.3) − 5 g(3, 8; 0.3),   g(a, b; λ) = exp(−λ √(((x − a)² + (y − b)²)/2))

Each point is a replica of a network of one weight with two entries: SGD with learning rate 0.1 for 1000 steps on the exact
gradient plus Gaussian noise; the points start at (0, 5) and (5, 0). The text leaves open how large the noise is and how often
PAPA pulls. Chosen here: a standard deviation of 0.1 in each coordinate; a pull after every step (the text's α = 0.99 is a share
of the mean of 0.01), which is what WASH at p = 0.01 does in expectation; and for comparison one after every tenth.

It is the noise that decides: with 0.1, 0.5, 1 and 1.5, WASH brought both points to the global minimum in 91, 59, 30 and 14 % of
400 runs (the same rules written out for all runs at once), PAPA after every step in 0, 4, 15 and 24 %. Large noise
carries points out of minima by itself, and a shuffle carries one that has arrived away again. Each coordinate changes places
about five times in 1000 steps, so it also takes luck.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import unlocked as ul

MINIMA = (
    (10.0, 10.0, 10.0, 0.1),
    (5.0, 8.0, 3.0, 0.3),
    (5.0, 3.0, 8.0, 0.3),
)  # depth, x, y, λ; the first is the global one
STARTS = ((0.0, 5.0), (5.0, 0.0))
METHODS: dict[str, Callable[[], ul.consensus.Consensus]] = {
    "separately": ul.consensus.Independent,
    "papa": lambda: ul.consensus.PAPA(alpha=0.01, anneal=False, period=1),
    "papa, T = 10": lambda: ul.consensus.PAPA(alpha=0.01, anneal=False, period=10),
    "wash": lambda: ul.consensus.WASH(p=0.01),
}


def f(points: Tensor) -> Tensor:
    """The function at points (..., 2)."""
    depths, x, y, decays = torch.tensor(MINIMA, dtype=points.dtype).T
    squares = (points[..., None, :] - torch.stack([x, y], -1)).square().sum(-1)
    return -(depths * torch.exp(-decays * torch.sqrt(0.5 * squares))).sum(-1)


class Point(nn.Module):
    """A network whose output is its weight, whatever comes in: (B, 2) → (B, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """The position, for each sample."""
        return self.position.expand(len(x), 2)


def noisy(position: Tensor, noise: Tensor) -> Tensor:
    """A loss whose gradient is that of f, plus the noise (1, 2)."""
    return (f(position) + (position * noise).sum(-1)).mean()


def trajectories(rule: ul.consensus.Consensus, seed: int, noise: float, steps: int = 1000) -> Tensor:
    """Where the two points are, from the start to the end: (steps + 1, 2, 2)."""
    trainer = ul.Trainer(
        ul.Chain([ul.Stage(Point(), loss=noisy)]),
        consensus=rule,
        replicas=2,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        seed=seed,
    )
    weights = [next(chain.parameters()) for chain in trainer.chains]
    with torch.no_grad():
        for weight, start in zip(weights, STARTS):
            weight.copy_(torch.tensor(start))
    kicks = noise * torch.randn(steps, 2, 1, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    path = [torch.stack([weight.detach().clone() for weight in weights])]
    for kick in kicks:
        trainer.step([torch.zeros(1, 2)] * 2, list(kick))
        path.append(torch.stack([weight.detach().clone() for weight in weights]))
    return torch.stack(path)


def minimum_of(point: Tensor) -> int | None:
    """The minimum (0: the global one) that a point has come to, within a distance of 1.5; None: to no one."""
    distances = [float((point - torch.tensor((x, y), dtype=point.dtype)).norm()) for _, x, y, _ in MINIMA]
    nearest = min(range(len(MINIMA)), key=distances.__getitem__)
    return nearest if distances[nearest] < 1.5 else None


def share(paths: Sequence[Tensor]) -> float:
    """Share of the runs that end with both points at the global minimum."""
    return sum(all(minimum_of(point) == 0 for point in path[-1]) for path in paths) / len(paths)


def draw(file: Path, paths: dict[str, Tensor]) -> None:
    """A panel for each method: the two trajectories over the levels of f."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from unlocked.report.drawing import COLOURS, INK, RC

    line = torch.linspace(-2.0, 14.0, 161, dtype=torch.float64)
    levels = f(torch.stack(torch.meshgrid(line, line, indexing="xy"), -1))
    with rc_context(RC):
        figure = Figure(figsize=(4.0 * len(paths), 4.1), layout="constrained")
        figure.patch.set_facecolor("white")
        for axes, (name, path) in zip(figure.subplots(1, len(paths), squeeze=False)[0], paths.items()):
            axes.contour(line, line, levels, 14, colors="#C8CEDA", linewidths=0.8)
            for n in range(2):
                axes.plot(*path[:, n].T, color=COLOURS[n], linewidth=0.9)
                axes.plot(*path[0, n], "P", color=COLOURS[n], markeredgecolor="white", markersize=10)
                axes.plot(*path[-1, n], "o", color=COLOURS[n], markeredgecolor=INK, markersize=9)
            _mark_minima(axes)
            axes.set_aspect("equal")
            axes.set_title(name, loc="left", fontsize=11, fontweight="bold", color=INK)
        figure.savefig(file, dpi=110, metadata={"Software": None})


def _mark_minima(axes: Any) -> None:
    for k, (_, x, y, _) in enumerate(MINIMA):
        axes.plot(x, y, "v" if k else "^", color="white", markeredgecolor="black", markersize=7, zorder=5)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--noise", type=float, default=0.1)
    parser.add_argument("--to", type=Path, default=Path("wash_two_dimensions.png"))
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # two numbers: nothing to share out
    first = {}
    for name, make in METHODS.items():
        paths = [trajectories(make(), seed, given.noise, given.steps) for seed in range(given.seeds)]
        first[name] = paths[0]
        ends = "  ".join(f"({x:5.2f}, {y:5.2f})" for x, y in paths[0][-1].tolist())
        print(
            f"{name:13s} seed 0 ends at {ends}; both points at the global minimum in {100 * share(paths):3.0f} % of "
            f"{given.seeds} runs"
        )
    draw(given.to, first)
    print(f"drawn: {given.to}")


if __name__ == "__main__":
    main()
