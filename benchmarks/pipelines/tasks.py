"""What is trained: networks and batches, how they are cut, what a step costs and sends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import unlocked as ul
from unlocked.chain import Chain
from unlocked.costs import run_once
from unlocked.cutting import from_recipe_of_chain
from unlocked.models import Layered


class Task(NamedTuple):
    """A network and one batch: x (B, …), y. head: the kind of head that local stages get."""

    name: str
    model: str
    options: dict[str, Any]
    x: Tensor
    y: Tensor
    head: str = "mlp"

    @property
    def dgl(self) -> ul.credit.DGL:
        """DGL with these heads, at most 10 % of a stage's FLOPs."""
        return ul.credit.DGL(head=self.head)

    def network(self) -> Layered:
        """A new network, uncut."""
        classes = 256 if self.model in ("gpt", "revgpt") else 10
        return ul.models.build(self.model, input_shape=tuple(self.x.shape[1:]), classes=classes, **self.options)


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Of every variant. The batch is always the same random one: a larger rate diverges in some cuts."""
    return torch.optim.SGD(parameters, lr=0.001, momentum=0.9)


def tasks(names: list[str], head: str) -> list[Task]:
    """Batches are such that a step of one thread takes 60 to 150 ms, and can be split into 8."""
    torch.manual_seed(0)
    known = [
        Task("mlp", "mlp", {"width": 384, "depth": 24}, torch.randn(512, 384), torch.randint(10, (512,))),
        Task("resnet18", "resnet18", {"width": 0.25}, torch.randn(32, 3, 32, 32), torch.randint(10, (32,))),
        Task("gpt", "gpt", {}, torch.randint(256, (16, 128)), torch.randint(256, (16, 128))),
    ]
    _, images, text = known
    known += [
        images._replace(name="revresnet18", model="revresnet18"),
        text._replace(name="revgpt", model="revgpt"),
    ]
    return [task._replace(head=head) for task in known if task.name in names]


def chain_of(task: Task, recipe: dict[str, Any], credit: Any = None) -> Chain:
    """A new chain of this task, the same on every call and process; with the heads that the credit rule wants."""
    torch.manual_seed(0)
    chain = from_recipe_of_chain(recipe, task.x)
    if credit is not None:
        credit.prepare(chain, 0)
    return chain


def flops_of(step: Callable[[], object]) -> int:
    """Floating-point operations of one step, forward and backward."""
    counter = FlopCounterMode(display=False)
    with counter:
        step()
    return int(counter.get_total_flops())


def inputs_of(chain: Chain, x: Tensor) -> list[Tensor]:
    """What goes into each stage, and last what comes out of the network."""
    row = [x]
    for stage in chain:
        row.append(run_once(stage.body, row[-1]))
    return row


def payload(chain: Chain, task: Task, rank: int, gradients: bool) -> dict[str, int]:
    """Predicted bytes that stage `rank` sends per step, from shapes alone: one activation up, one gradient down."""
    shapes = [h.numel() * h.element_size() for h in inputs_of(chain, task.x)]
    sent = {}
    if rank < len(chain) - 1:
        sent["activation"] = shapes[rank + 1]
    if rank > 0 and gradients:
        sent["gradient"] = shapes[rank]
    return sent
