"""Weight prediction (Chen et al., 2018: SpecTrain; Guan et al., 2019: XPipe; F Example 6; FACTS 2.8).

    θ̂_t = θ_t − Σ_{s=1..τ} (what the optimizer would do in step s if all gradients were 0)

    SGD with momentum   θ̂ = θ − γ v (μ + μ² + … + μ^τ)              v momentum buffer, μ momentum
    Adam, AdamW         θ̂ = θ − Σ_s γ m β₁^s / (1 − β₁^{t+s}) / (√(v β₂^s / (1 − β₂^{t+s})) + ε)
    linear              θ̂ = θ − τ γ v                                (the thesis' form, SGD with momentum only)

The forward is computed at θ̂_t. τ: updates that will come before this micro-batch's own gradient is used, counted from the
micro-batches in front of it when its forward begins. The learning rate γ is taken to stay what it is. A micro-batch whose
backward sees the weights of its forward (stash) sees θ̂_t there too; under the other semantics it sees what they say.

Limits: τ = 0, momentum 0 or no step taken yet is the identity (weight decay without momentum, and Adam's own, which is part of
its gradient, are not foreseen; SGD's with momentum and AdamW's are).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..errors import InvalidChoice, choose
from ..rules.prediction import predict_adam, predict_linear, predict_sgd
from ..versions import Versions
from .base import Mitigating, Mitigation, Properties

Form = Literal["exact", "linear"]


class _Predicted(Mitigating):
    def __init__(self, optimizer: torch.optim.Optimizer, versions: Versions, form: Form) -> None:
        super().__init__(optimizer, versions)
        self._form = form
        self._groups = {id(x): group for group in optimizer.param_groups for x in group["params"]}

    def predict(self, tau: int) -> list[Tensor] | None:
        if tau == 0 or not self.optimizer.state:
            return None
        with torch.no_grad():
            return [self._one(x, tau) for x in self.versions.parameters]

    def _one(self, x: nn.Parameter, tau: int) -> Tensor:
        group, state = self._groups[id(x)], self.optimizer.state.get(x, {})
        if isinstance(self.optimizer, torch.optim.SGD):
            return self._sgd(x, group, state, tau)
        if not state:
            return x.detach().clone()
        return predict_adam(
            x.detach(),
            state["exp_avg"],
            state["exp_avg_sq"],
            int(state["step"]),
            [float(group["lr"])] * tau,
            group["betas"],
            group["eps"],
            tau,
            weight_decay=group["weight_decay"] if isinstance(self.optimizer, torch.optim.AdamW) else 0.0,
        )

    def _sgd(self, x: nn.Parameter, group: dict[str, Any], state: dict[str, Any], tau: int) -> Tensor:
        velocity = state.get("momentum_buffer")
        if velocity is None:
            return x.detach().clone()
        if self._form == "linear":
            return predict_linear(x.detach(), velocity, float(group["lr"]), tau)
        return predict_sgd(
            x.detach(),
            velocity,
            float(group["lr"]),
            group["momentum"],
            tau,
            nesterov=group["nesterov"],
            weight_decay=group["weight_decay"],
        )


@dataclass(frozen=True)
class WeightPrediction(Mitigation):
    """Compute a forward at the weights expected when its gradient will be used.

    Args:
        form: "exact" (the optimizer's own steps under zero gradients) or "linear" (τ times the last one; SGD only).
    """

    form: Form = "exact"

    name: ClassVar[str] = "weight-prediction"
    predicts: ClassVar[bool] = True
    properties: ClassVar[Properties] = Properties(
        title="Weight prediction (Chen et al. 2018)",
        source="F Example 6",
        formula="forward at θ − Σ_s step_s(gradient 0)",
        memory="Ψ_P per micro-batch in flight",
    )

    def __post_init__(self) -> None:
        choose("form", self.form, ("exact", "linear"))

    def start(self, optimizer: torch.optim.Optimizer, versions: Versions) -> Mitigating:
        kinds = (torch.optim.SGD,) if self.form == "linear" else (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
        if optimizer is not None and type(optimizer) not in kinds:
            raise InvalidChoice(
                f"weight-prediction (form {self.form}) knows the steps of {', '.join(kind.__name__ for kind in kinds)}, not "
                f"of {type(optimizer).__name__}; take one of these, or another mitigation."
            )
        for group in [] if optimizer is None else optimizer.param_groups:
            if group.get("amsgrad") or group.get("dampening"):
                raise InvalidChoice(
                    "weight-prediction does not know the steps of amsgrad or of SGD with dampening; leave these out, or take "
                    "another mitigation."
                )
        return _Predicted(optimizer, versions, self.form)
