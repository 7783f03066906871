"""The corrections of late gradients, and the prediction of weights: closed forms, against torch's optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unlocked.errors import InvalidChoice
from unlocked.rules.prediction import predict_adam, predict_linear, predict_sgd
from unlocked.rules.staleness import (
    adaptive_lambda,
    bias_corrected,
    delay_compensation,
    gap_aware,
    running_square,
    staleness_aware,
)

HUGE = 1e100
finite = st.floats(-HUGE, HUGE, allow_subnormal=True)
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
shares = st.floats(0.0, 0.99)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, the sign of zeros and NaN included."""
    bits = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16}
    return a.dtype == b.dtype and torch.equal(a.view(bits[a.dtype]), b.view(bits[b.dtype]))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-13) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- identities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_without_delay_every_correction_is_the_identity_bit_for_bit(dtype: torch.dtype) -> None:
    g = torch.tensor([0.0, -0.0, 1.0, -1.7, 3e38, -3e38, 1e-38, 1e-41, math.pi], dtype=dtype)
    zero, scales = torch.zeros_like(g), (torch.zeros_like(g), torch.ones_like(g), torch.tensor(0.0, dtype=dtype))
    assert same_bits(staleness_aware(g, 0), g)
    assert same_bits(staleness_aware(g, 1), g)
    assert all(same_bits(gap_aware(g, zero, scale), g) for scale in scales)
    assert all(same_bits(gap_aware(g, -zero, scale), g) for scale in scales)
    for lam in (0.0, 0.04, 1e4, adaptive_lambda(2.0, zero)):
        assert same_bits(delay_compensation(g, zero, lam), g)
        assert same_bits(delay_compensation(g, -zero, lam), g)


def test_zero_updates_ahead_are_the_weights_themselves() -> None:
    theta, v = normal((3,)), normal((3,), 1)
    assert predict_linear(theta, v, 0.1, 0) is theta
    assert predict_sgd(theta, v, 0.1, 0.9, 0, nesterov=True, weight_decay=0.1) is theta
    assert predict_adam(theta, v, v * v, 3, [], (0.9, 0.999), 1e-8, 0, weight_decay=0.1) is theta


@given(shapes, st.integers(0, 2**31), st.integers(0, 50))
@settings(deadline=None)
def test_shapes_stay_and_inputs_are_not_changed(shape: tuple[int, ...], seed: int, tau: int) -> None:
    g, d = normal(shape, seed), normal(shape, seed + 1)
    kept = g.clone(), d.clone()
    results = [
        staleness_aware(g, tau),
        gap_aware(g, d, d * d),
        delay_compensation(g, d, adaptive_lambda(0.5, g * g)),
        running_square(g, d, 0.9),
        bias_corrected(g, 0.9, tau),
        predict_linear(g, d, 0.1, tau),
        predict_sgd(g, d, 0.1, 0.9, tau, weight_decay=0.1),
        predict_adam(g, d, d * d, 2, 0.1, (0.9, 0.99), 1e-8, tau, weight_decay=0.1),
    ]
    assert all(x.shape == shape for x in results)
    assert torch.equal(g, kept[0])
    assert torch.equal(d, kept[1])


# ---- corrections -----------------------------------------------------------------------------------------------------


@given(finite, st.integers(0, 10**6))
@settings(deadline=None)
def test_staleness_aware_divides_by_the_delay(g: float, tau: int) -> None:
    assert staleness_aware(tensor(g), tau).item() == g / max(1, tau)


@given(finite, finite, st.floats(0.0, HUGE, allow_subnormal=True))
@settings(deadline=None, max_examples=60)
def test_gap_aware_is_its_formula_or_its_limit_and_never_nan(g: float, drift: float, scale: float) -> None:
    (result,) = gap_aware(tensor(g), tensor(drift), tensor(scale)).tolist()
    assert abs(result) <= abs(g)
    if scale > 0.0:
        size = (tensor(drift).abs() / scale).item()
        assert result == g / (1.0 + size)
    else:
        assert result == (g if drift == 0.0 else 0.0)


def test_gap_aware_goes_to_its_value_at_scale_zero() -> None:
    g, drift = tensor(2.0, 2.0), tensor(0.0, 3.0)
    near = gap_aware(g, drift, torch.tensor(1e-300, dtype=torch.float64))
    close(near, gap_aware(g, drift, torch.tensor(0.0, dtype=torch.float64)))


@given(finite, finite, finite)
@settings(deadline=None, max_examples=60)
def test_delay_compensation_is_its_formula_and_never_nan(g: float, drift: float, lam: float) -> None:
    (result,) = delay_compensation(tensor(g), tensor(drift), lam).tolist()
    assert not math.isnan(result)
    term = lam * drift * g * g
    if max(abs(g), abs(drift), abs(lam)) < 1e70:  # where nothing overflows
        assert math.isfinite(result)
        assert result == pytest.approx(g + term, rel=1e-12, abs=1e-12 * max(abs(g), abs(term)) + 1e-300)


@given(st.floats(0.0, 10.0), st.floats(0.0, HUGE), st.floats(1e-12, 1.0))
@settings(deadline=None)
def test_adaptive_lambda_is_its_formula_and_finite(lambda0: float, mean_square: float, epsilon: float) -> None:
    (result,) = adaptive_lambda(lambda0, tensor(mean_square), epsilon).tolist()
    assert result == pytest.approx(lambda0 / math.sqrt(mean_square + epsilon), rel=1e-12)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan])
def test_adaptive_lambda_refuses_what_could_be_infinite(epsilon: float) -> None:
    with pytest.raises(InvalidChoice, match="above 0"):
        adaptive_lambda(1.0, tensor(0.0), epsilon)


@given(st.lists(finite, min_size=1, max_size=20), shares)
@settings(deadline=None)
def test_the_running_square_is_the_weighted_mean_of_the_squares(values: list[float], decay: float) -> None:
    average = tensor(0.0)
    for x in values:
        average = running_square(average, tensor(x), decay)
    weights = [(1 - decay) * decay**age for age in reversed(range(len(values)))]
    expected = sum(w * x * x for w, x in zip(weights, values))
    assert average.item() == pytest.approx(expected, rel=1e-9, abs=1e-290)
    corrected = bias_corrected(average, decay, len(values)).item()
    assert corrected == pytest.approx(expected / sum(weights), rel=1e-9, abs=1e-290)


@given(finite, shares, st.integers(1, 30))
@settings(deadline=None)
def test_the_corrected_average_of_a_constant_is_the_constant(x: float, decay: float, count: int) -> None:
    average = tensor(0.0)
    for _ in range(count):
        average = running_square(average, tensor(x), decay)
    assert bias_corrected(average, decay, count).item() == pytest.approx(x * x, rel=1e-9, abs=1e-290)


def test_an_average_of_nothing_is_given_back() -> None:
    assert bias_corrected(tensor(0.0), 0.999, 0).tolist() == [0.0]


# ---- corrections on quadratics f(θ) = ½hθ² ---------------------------------------------------------------------------


def delayed_descent(
    h: Tensor, rate: float, tau: int, steps: int, correct: Callable[[Tensor, Tensor], Tensor]
) -> list[Tensor]:
    """θ_{t+1} = θ_t − γ correct(hθ_{t−τ}, θ_t − θ_{t−τ}), with θ_t = 1 for t ≤ 0."""
    path = [torch.ones_like(h)] * (tau + 1)
    for _ in range(steps):
        then = path[-1 - tau]
        path.append(path[-1] - rate * correct(h * then, path[-1] - then))
    return path[tau:]


def test_delay_compensation_with_the_true_curvature_undoes_the_delay() -> None:
    """λ g⊙g = h makes g + λ g⊙g⊙d the gradient at today's weights, so the path is that of plain descent."""
    h, rate, steps = tensor(0.1, 0.7, 2.0), 0.3, 12
    compensated = delayed_descent(h, rate, 4, steps, lambda g, d: delay_compensation(g, d, h / (g * g)))
    for t, theta in enumerate(compensated):
        close(theta, (1 - rate * h) ** t, 1e-12)
    late = delayed_descent(h, rate, 4, steps, lambda g, d: g)
    assert ((late[-1] - compensated[-1]).abs() > 1e-3).all()


@given(st.floats(0.01, 100.0), st.floats(-10.0, 10.0))
@settings(deadline=None)
def test_delay_compensation_is_exact_for_samples_one_deviation_from_the_weights(h: float, drift: float) -> None:
    """f(θ; x) = ½h(θ − x)², x = θ_{t−τ} ± 1/√h: g² = h, so λ = 1 gives each sample's gradient at θ_t exactly."""
    then = 0.3
    x = then + tensor(1.0, -1.0) / math.sqrt(h)
    g = h * (then - x)
    compensated = delay_compensation(g, torch.full_like(g, drift), 1.0)
    close(compensated, h * (then + drift - x), 1e-9)


def test_gap_aware_divides_by_one_plus_the_delay_where_the_gradient_is_constant() -> None:
    g, rate, tau = tensor(0.2, -3.0, 50.0), 0.1, 5
    drift = -tau * rate * g
    close(gap_aware(g, drift, rate * g.abs()), g / (1 + tau))


@pytest.mark.parametrize("tau", [1, 2, 7])
def test_the_gap_on_a_quadratic_is_a_geometric_sum(tau: int) -> None:
    """θ_t = q^t, q = 1 − γh, and s = γ|∇f(θ_{t−τ})|: the gap is 1 + q + … + q^{τ−1}, at most τ."""
    h, rate, t = tensor(0.1, 0.9, 2.5), 0.3, 9
    q = 1 - rate * h
    g = h * q ** (t - tau)
    drift = q**t - q ** (t - tau)
    expected = g / (1 + sum(q**s for s in range(tau)))
    close(gap_aware(g, drift, rate * g.abs()), expected, 1e-12)


@pytest.mark.parametrize("tau", [2, 3, 6])
def test_staleness_aware_makes_late_descent_stable(tau: int) -> None:
    """θ_{t+1} = θ_t − γhθ_{t−τ} is stable below γh = 2 sin(π / (4τ + 2)), which is above 1/τ."""
    bound = 2 * math.sin(math.pi / (4 * tau + 2))
    h = tensor(1.0)

    def end(rate: float, correct: Callable[[Tensor, Tensor], Tensor]) -> float:
        return abs(delayed_descent(h, rate, tau, 600, correct)[-1].item())  # from 1

    assert end(0.95 * bound, lambda g, d: g) < 0.1
    assert end(1.05 * bound, lambda g, d: g) > 10.0
    assert end(0.9, lambda g, d: g) > 1e2
    assert end(0.9, lambda g, d: staleness_aware(g, tau)) < 0.1


# ---- prediction, against torch.optim without gradients ---------------------------------------------------------------


def trained(make: Callable[..., torch.optim.Optimizer], steps: int) -> tuple[Tensor, torch.optim.Optimizer]:
    """Weights and their optimizer after some steps with random gradients."""
    theta = normal((4, 3)).requires_grad_()
    optimizer = make([theta])
    for s in range(steps):
        theta.grad = normal((4, 3), 10 + s)
        optimizer.step()
    return theta, optimizer


def coast(
    theta: Tensor, optimizer: torch.optim.Optimizer, rates: list[float], gradient: Tensor | None = None
) -> Tensor:
    """The weights after one step for each learning rate, with gradients of zero or the one given."""
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        theta.grad = torch.zeros_like(theta) if gradient is None else gradient.clone()
        optimizer.step()
    return theta.detach()


schedules = pytest.mark.parametrize("rates", [[0.1], [0.1] * 6, [0.3, 0.2, 0.05, 0.0, 0.7]])


@schedules
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("momentum", [0.5, 0.9, 1.0])
def test_predicted_sgd_is_torch_sgd_without_gradients(
    rates: list[float], nesterov: bool, weight_decay: float, momentum: float
) -> None:
    make = partial(torch.optim.SGD, lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
    theta, optimizer = trained(make, 3)
    buffer = optimizer.state[theta]["momentum_buffer"].clone()
    predicted = predict_sgd(
        theta.detach().clone(),
        buffer,
        rates,
        momentum,
        len(rates),
        nesterov=nesterov,
        weight_decay=weight_decay,
    )
    close(predicted, coast(theta, optimizer, rates))


@given(st.floats(0.0, 0.999), st.integers(0, 30), st.floats(1e-6, 10.0))
@settings(deadline=None)
def test_predicted_sgd_is_the_geometric_sum(momentum: float, tau: int, rate: float) -> None:
    theta, v = normal((3,)), normal((3,), 1)
    expected = theta - rate * v * (momentum - momentum ** (tau + 1)) / (1 - momentum)
    close(predict_sgd(theta, v, rate, momentum, tau), expected, 1e-10 * (1 + rate * tau))


def test_without_momentum_nothing_moves_and_with_all_of_it_the_way_is_straight() -> None:
    theta, v = normal((3,)), normal((3,), 1)
    assert torch.equal(predict_sgd(theta, v, 0.1, 0.0, 7), theta)
    close(predict_sgd(theta, v, 0.1, 1.0, 7), predict_linear(theta, v, 0.1, 7))
    close(predict_linear(theta, v, 0.1, 7), theta - 7 * 0.1 * v)
    close(predict_linear(theta, v, [0.1, 0.2, 0.5, 9.0], 3), theta - 0.8 * v)


def test_the_linear_form_is_exact_when_gradients_keep_the_momentum() -> None:
    theta, optimizer = trained(partial(torch.optim.SGD, lr=0.1, momentum=0.8), 3)
    v = optimizer.state[theta]["momentum_buffer"].clone()
    predicted = predict_linear(theta.detach().clone(), v, [0.1, 0.3, 0.2], 3)
    close(predicted, coast(theta, optimizer, [0.1, 0.3, 0.2], gradient=(1 - 0.8) * v))


@schedules
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_predicted_adam_is_torch_adamw_without_gradients(rates: list[float], weight_decay: float) -> None:
    make = partial(torch.optim.AdamW, lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=weight_decay)
    theta, optimizer = trained(make, 4)
    state = {name: x.clone() for name, x in optimizer.state[theta].items()}
    arguments = (theta.detach().clone(), state["exp_avg"], state["exp_avg_sq"], int(state["step"]), rates)
    predicted = predict_adam(*arguments, (0.8, 0.95), 1e-3, len(rates), weight_decay=weight_decay)
    frozen = predict_adam(*arguments, (0.8, 0.95), 1e-3, len(rates), weight_decay=weight_decay, frozen_second=True)
    true = coast(theta, optimizer, rates)
    close(predicted, true, 1e-12)
    assert (frozen - true).abs().max() > 1e-5  # FTPipe's form is another one


def test_the_frozen_form_of_adam_is_its_formula() -> None:
    theta, m, u, n, (b1, b2) = normal((3,)), normal((3,), 1), normal((3,), 2) ** 2, 5, (0.8, 0.95)
    expected = theta.clone()
    for s, rate in enumerate([0.1, 0.4], start=1):
        expected -= rate * m * b1**s / (1 - b1 ** (n + s)) / ((u / (1 - b2 ** (n + s))).sqrt() + 1e-3)
    close(predict_adam(theta, m, u, n, [0.1, 0.4], (b1, b2), 1e-3, 2, frozen_second=True), expected)


def test_more_rates_than_updates_are_of_no_consequence_and_one_rate_stands_for_all() -> None:
    theta, v = normal((3,)), normal((3,), 1)
    for predict in (
        partial(predict_linear, theta, v),
        lambda rate, tau: predict_sgd(theta, v, rate, 0.9, tau),
        lambda rate, tau: predict_adam(theta, v, v * v, 4, rate, (0.9, 0.99), 1e-8, tau),
    ):
        assert torch.equal(predict([0.1, 0.1, 0.1, 5.0], tau=3), predict(0.1, tau=3))
        with pytest.raises(InvalidChoice, match="2 learning rates do not reach 3"):
            predict([0.1, 0.1], tau=3)
        with pytest.raises(InvalidChoice, match="at least 0"):
            predict(0.1, tau=-1)


@given(finite, finite, st.floats(0.0, 1.0), st.integers(0, 200))
@settings(deadline=None)
def test_predictions_of_finite_values_are_finite(theta: float, v: float, momentum: float, tau: int) -> None:
    a, b = tensor(theta), tensor(v)
    assert predict_linear(a, b, 1.0, tau).isfinite().all()
    assert predict_sgd(a, b, 1.0, momentum, tau).isfinite().all()
    assert predict_adam(a, b, b * b, 1, 1.0, (0.9, 0.999), 1e-8, tau).isfinite().all()


# ---- prediction on a quadratic ---------------------------------------------------------------------------------------


def momentum_path(
    h: Tensor, rate: float, momentum: float, steps: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """θ_t, the buffer after t updates, and the gradient at θ_t, for SGD with momentum on ½hθ²."""
    theta, v = torch.ones_like(h), torch.zeros_like(h)
    path, buffers, gradients = [theta], [v], [h * theta]
    for _ in range(steps):
        v = momentum * v + h * theta
        theta = theta - rate * v
        path, buffers, gradients = [*path, theta], [*buffers, v], [*gradients, h * theta]
    return path, buffers, gradients


@pytest.mark.parametrize("tau", [1, 2, 5])
def test_the_error_of_a_prediction_is_the_gradients_to_come(tau: int) -> None:
    """θ_{t+τ} = θ̂ − Σ_{s=1..τ} γ g_{t+s−1} (1 − μ^{τ−s+1}) / (1 − μ), exactly."""
    h, rate, momentum = tensor(0.01, 0.3, 1.0), 0.1, 0.9
    path, buffers, gradients = momentum_path(h, rate, momentum, 30)
    for t in range(len(path) - tau):
        predicted = predict_sgd(path[t], buffers[t], rate, momentum, tau)
        missing = sum(
            rate * gradients[t + s - 1] * (1 - momentum ** (tau - s + 1)) / (1 - momentum) for s in range(1, tau + 1)
        )
        close(predicted - missing, path[t + tau], 1e-12)


@pytest.mark.parametrize("tau", [1, 2, 4])
def test_prediction_comes_nearer_to_the_weights_to_come_on_a_quadratic(tau: int) -> None:
    h, rate, momentum, steps = tensor(0.01, 0.1, 0.5), 0.05, 0.9, 200
    path, buffers, _ = momentum_path(h, rate, momentum, steps)
    times = range(steps - tau)
    still = sum((path[t] - path[t + tau]).abs() for t in times)
    moved = sum((predict_sgd(path[t], buffers[t], rate, momentum, tau) - path[t + tau]).abs() for t in times)
    linear = sum((predict_linear(path[t], buffers[t], rate, tau) - path[t + tau]).abs() for t in times)
    assert (moved < 0.5 * still).all()
    assert (linear < 0.5 * still).all()
