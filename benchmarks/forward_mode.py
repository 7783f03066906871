"""Forward mode against two backwards and backpropagation: seconds of a step, bytes alive at its peak.

    python benchmarks/forward_mode.py [--rounds 9] [--batch 64] [--compiled]

Networks: ResNet-18 of width 0.25 on 32×32 images cut into J = 2, 4, 8 stages, a GPT of 2, 4, 8 and 16 blocks with a stage each.
In one process, one thread, SGD; J stages one after the other. Peak: all tensors alive at once, less weights, their gradients
and the batch (what a network of that depth needs under any rule). Times are ratios to backpropagation's in the same round.

    shared      one scalar and one tangent for the network, Gaussian: its forward pass is all there is, but for the last stage
    stage       a scalar and a tangent for each stage, Gaussian; local: of the stage's own linear head
    tensor      a scalar and a tangent for each tensor of weights, local guess
    activity    a scalar for each sample, local guess; samples together

`--compiled`: torch.compile of the Jacobian-vector product of the whole network against its own forward and backward, once (the
compiler takes minutes).
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import unlocked as ul
from unlocked.probes.live import LiveBytes

from common import interleaved, ratio, result

RULES: dict[str, Callable[[], ul.credit.Credit]] = {
    "backprop": ul.credit.Backprop,
    "two backwards": lambda: ul.credit.ForwardGradient(
        scalars="stage", mode="two-backward", head="linear", budget=None
    ),
    "shared": lambda: ul.credit.ForwardGradient("gaussian", scalars="shared"),
    "stage": lambda: ul.credit.ForwardGradient("gaussian", scalars="stage"),
    "stage, local": lambda: ul.credit.ForwardGradient(scalars="stage", head="linear", budget=None),
    "tensor, local": lambda: ul.credit.ForwardGradient(head="linear", budget=None),
    "activity, local": lambda: ul.credit.ForwardGradient(
        space="activity", samples="together", head="linear", budget=None
    ),
}


def batch_of(kind: str, size: int) -> tuple[Tensor, Tensor]:
    """Random images or tokens, with their targets."""
    torch.manual_seed(1)
    if kind == "resnet18":
        return torch.randn(size, 3, 32, 32), torch.randint(10, (size,))
    tokens = torch.randint(64, (max(2, size // 8), 64))
    return tokens, tokens.roll(-1, 1)


def session(kind: str, stages: int, rule: str, x: Tensor) -> ul.Trainer:
    """A trainer in one process."""
    torch.manual_seed(0)
    if kind == "resnet18":
        model: nn.Module = ul.models.resnet18((3, 32, 32), 10, width=0.25)
    else:
        model = ul.models.gpt((64,), 64, width=64, layers=stages, heads=4)
    chain = ul.cut(model, stages, like=x, balance="flops" if kind == "resnet18" else "parameters")
    return ul.Trainer(chain, credit=RULES[rule](), optimizer=functools.partial(torch.optim.SGD, lr=1e-3))


def peak_of(made: ul.Trainer, x: Tensor, y: Tensor) -> int:
    """Most bytes alive in a step, without the weights, as many gradients, and the batch."""
    weights = [*made.chains[0].parameters(), *made.chains[0].buffers()]
    with LiveBytes() as live:
        live.register("parameters", weights)
        live.register("input", [x, y])
        made.step(x, y)
    always = sum(p.numel() * p.element_size() for p in weights)
    gradients = sum(p.numel() * p.element_size() for p in weights if isinstance(p, nn.Parameter) and p.requires_grad)
    return live.peak - always - gradients - sum(t.numel() * t.element_size() for t in (x, y))


def measure(kind: str, stages: int, given: argparse.Namespace) -> dict[str, Any]:
    """Every rule on one network."""
    x, y = batch_of(kind, given.batch)
    made = {rule: session(kind, stages, rule, x) for rule in RULES}
    peaks = {}
    for rule, one in made.items():
        one.step(x, y)
        peaks[rule] = peak_of(one, x, y)
    times = interleaved({rule: functools.partial(one.step, x, y) for rule, one in made.items()}, given.rounds, 1)
    tangents = {}
    for rule, one in made.items():
        credit = one.credit
        if isinstance(credit, ul.credit.ForwardGradient) and credit.mode == "forward" and stages > 1:
            tangents[rule] = credit.streams(one.chains[0], len(x)).products
    rows = {
        rule: {
            "time": ratio(times, rule, "backprop"),
            "peak": peaks[rule] / peaks["backprop"],
            "bytes": peaks[rule],
            "tangents": tangents.get(rule, 0),
        }
        for rule in RULES
    }
    print(f"\n{kind}, {stages} stages, batch {tuple(x.shape)}, backprop {median(times['backprop']):.3f} s a step")
    print(f"{'':18}{'time/backprop':>14}{'peak MB':>10}{'peak/backprop':>15}{'tangents':>10}")
    for rule, row in rows.items():
        print(
            f"{rule:18}{row['time']:14.2f}{row['bytes'] / 1e6:10.1f}{row['peak']:15.2f}{row['tangents']:10d}",
            flush=True,
        )
    return rows


def compiled(given: argparse.Namespace) -> dict[str, float]:
    """The product of a whole ResNet along a direction of its weights, eager and compiled, over forward + backward."""
    x, y = batch_of("resnet18", given.batch)
    model = ul.models.resnet18((3, 32, 32), 10, width=0.25)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.track_running_stats, part.running_mean, part.running_var = False, None, None
    weights = {name: p.detach() for name, p in model.named_parameters()}
    along = {name: torch.randn_like(p) for name, p in weights.items()}

    def loss(changed: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(model, changed, (x,)), y)

    def pushed() -> Any:
        return torch.func.jvp(loss, (weights,), (along,))

    def backward() -> None:
        nn.functional.cross_entropy(model(x), y).backward()

    quick, forward = torch.compile(pushed), torch.compile(lambda: nn.functional.cross_entropy(model(x), y))
    with torch.no_grad():
        quick()
    forward().backward()
    variants = {
        "backprop": backward,
        "jvp": torch.no_grad()(pushed),
        "compiled jvp": torch.no_grad()(quick),
        "compiled backprop": lambda: forward().backward(),
    }
    times = interleaved(variants, given.rounds, 2)
    found = {name: ratio(times, name, "backprop") for name in variants if name != "backprop"}
    told = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
    print(f"\nwhole ResNet-18 of width 0.25, of eager forward + backward: {told}")
    return found


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=64, help="images; an eighth of it of texts of 64 tokens")
    parser.add_argument("--compiled", action="store_true", help="also torch.compile of the product, minutes")
    given = parser.parse_args()
    torch.set_num_threads(1)
    cases = [("resnet18", 2), ("resnet18", 4), ("resnet18", 8), ("gpt", 2), ("gpt", 4), ("gpt", 8), ("gpt", 16)]
    found = {f"{kind} {stages}": measure(kind, stages, given) for kind, stages in cases}
    whole = compiled(given) if given.compiled else None
    result("forward_mode", cases=found, compiled=whole)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
