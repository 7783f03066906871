"""Which method for your own model on your own machines? Nothing is trained here, and no weight is computed with.

Run: python examples/plan_your_model.py
"""

import torch
from rich.console import Console
from torch import nn

import unlocked as ul


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


# any model that ul.cut can cut
model = nn.Sequential(
    block(3, 64), block(64, 64), block(64, 128, 2), block(128, 128), block(128, 256, 2), block(256, 256),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10),
)  # fmt: skip
x = torch.empty(2, 3, 64, 64)  # only its shape matters

cluster = {"memory": "8GiB", "bandwidth": "1Gbit/s", "latency": "100us", "flops": "5T", "speeds": "1,1,0.5"}
plan = ul.plan(model, like=x, batch=128, devices=4, **cluster)

print(plan.headline)
Console(width=180).print(plan.table(limit=8))
best = plan.best
assert best is not None
print(f"{best.method}, J = {best.stages}: {best.bytes_step:,} bytes per update; {best.bound_by}")

# stages and heads of your own: a chain, or a function from a number of stages to a chain
chain = ul.Chain(
    [
        ul.Stage(model[:3], head=nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128 * 16, 10))),
        ul.Stage(model[3:]),
    ],
    like=x,
)
mine = ul.plan(chain, batch=128, devices=2, credit=("gpipe", "dgl"), consensus=("all-reduce",), bandwidth="10Gbit/s")
print(mine.headline)
