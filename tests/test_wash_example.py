"""The two points of examples/wash_two_dimensions.py: its function, its noise, where the points end, its picture."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import unlocked as ul

FILE = Path(__file__).parent.parent / "examples" / "wash_two_dimensions.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("wash_two_dimensions", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_function_is_that_of_the_appendix(example):
    """f(10, 10) and f(3, 8), term by term; and it is even under an exchange of x and y."""
    points = torch.tensor([[10.0, 10.0], [3.0, 8.0], [8.0, 3.0], [0.0, 5.0]], dtype=torch.float64)
    half = torch.tensor(0.5, dtype=torch.float64)
    far, near = torch.sqrt(half * 53), torch.sqrt(half * 50)  # squares of distances: 49 + 4, 25 + 25
    values = example.f(points)
    torch.testing.assert_close(values[0], -10 - 10 * torch.exp(-0.3 * far))
    torch.testing.assert_close(values[1], -5 - 10 * torch.exp(-0.1 * far) - 5 * torch.exp(-0.3 * near))
    torch.testing.assert_close(example.f(points.flip(1)), values)
    grid = torch.cartesian_prod(*[torch.linspace(-5, 15, 81, dtype=torch.float64)] * 2)
    assert grid[example.f(grid).argmin()].tolist() == [10.0, 10.0]


def test_a_step_is_sgd_on_the_exact_gradient_with_noise_added(example):
    path = example.trajectories(ul.consensus.Independent(), 3, 0.7, steps=2)
    start = torch.tensor(example.STARTS, dtype=torch.float64, requires_grad=True)
    assert torch.equal(path[0], start.detach())
    kicks = 0.7 * torch.randn(2, 2, 1, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(example.f(start).sum(), start)
    torch.testing.assert_close(path[1], (start - 0.1 * (gradient + kicks[0, :, 0])).detach())


def test_without_noise_two_points_end_in_a_minimum_each_and_papa_lets_them_agree(example):
    apart = example.trajectories(example.METHODS["separately"](), 0, 0.0, steps=250)[-1]
    assert [example.minimum_of(point) for point in apart] == [2, 1]
    pulled = example.trajectories(example.METHODS["papa"](), 0, 0.1, steps=150)
    distances = (pulled[:, 0] - pulled[:, 1]).norm(dim=-1)
    free = example.trajectories(example.METHODS["separately"](), 0, 0.1, steps=150)
    assert distances[-1] < (free[-1, 0] - free[-1, 1]).norm()


def test_wash_only_exchanges_coordinates(example):
    """A shuffle leaves the sum of the points; its jumps are an exchange of x, of y, or of both."""
    rule = ul.consensus.WASH(p=0.3)
    path = example.trajectories(rule, 1, 0.1, steps=40)
    free = example.trajectories(ul.consensus.Independent(), 1, 0.1, steps=40)
    for k in range(2):
        assert sorted(path[1, :, k].tolist()) == sorted(free[1, :, k].tolist())
    jumps = (path[1:] - path[:-1]).abs().amax(dim=1)
    assert bool((jumps > 1.0).any(0).all())  # both coordinates have changed places


def test_shares_and_minima(example):
    end = torch.tensor([[[10.1, 9.5], [9.9, 10.9]]])
    assert example.share([end, end + 3.0]) == 0.5
    assert example.minimum_of(torch.tensor([5.0, 5.0])) is None


def test_it_prints_and_draws(example, tmp_path, capsys):
    example.main(["--seeds", "1", "--steps", "5", "--to", str(tmp_path / "picture.png")])
    said = capsys.readouterr().out
    assert all(name in said for name in example.METHODS) and (tmp_path / "picture.png").stat().st_size > 10_000
