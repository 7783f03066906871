"""Members of a population that compute as one: their weights lie in stacks, and one vmapped forward serves all of them.

    θ^i ∈ ℝ^{N×…}, θ^i[n] = θ_n^i          h = vmap(f)(θ, x)          ∇_θ Σ_n ℓ(h[n], y_n)[n] = ∇ℓ(f(x_n, θ_n), y_n)

    N members, θ_n^i weight tensor i of member n, f the network, x_n, y_n the member's batch, ℓ its loss.

Every member keeps its own parameters and buffers; they are moved, once, into slices of the stacks (`_Row`). So whatever works
on a member in place (its optimizer, a shuffle, an average, a checkpoint) works on the stack, and nothing is copied from step to
step. A member's gradient is a slice of the stack's. Losses stay each member's own.

Limits: N = 1 is ordinary training. The numbers are those of members that compute one after the other, up to rounding; random
numbers inside the network (dropout) would be others, so they are refused. The activations of all members are kept at once: N
times those of a loop. Which weights are frozen is settled when the Trainer is made.

What it is worth depends on the operation: N small products become one batched product, but N convolutions become a grouped one,
which is slower on a CPU, and attention on a CPU is a loop inside vmap (PyTorch 2.13, which warns of it).

PyTorch's `functional_call` and `vmap`: https://docs.pytorch.org/tutorials/intermediate/ensembling.html
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..batch import Batch
from ..chain import Chain, Stage
from ..consensus.base import Consensus, Weights
from ..errors import InvalidChoice
from ..modes import buffers_kept
from ..worker import Worker
from .base import objective

if TYPE_CHECKING:
    from ..worlds import World

_TIMES = 5  # of either way, when it is measured which is faster
_REMEDY = "train them one after the other: stacked=False."


class _Row:
    """One weight or buffer of all members: `whole` (N, …), and the members' own tensors, which are its slices from now on."""

    def __init__(self, members: Sequence[Tensor]) -> None:
        first = members[0].detach()
        strides = (first.numel(), *torch.empty_like(first).stride())  # each slice lies in memory as the member did
        whole = torch.empty_strided((len(members), *first.shape), strides, dtype=first.dtype, device=first.device)
        with torch.no_grad():
            for member, own in zip(members, whole):
                member.set_(own.copy_(member))  # type: ignore[call-overload]
        self.whole, self.members = whole.requires_grad_(members[0].requires_grad), members

    def refuse_moved(self, name: str) -> None:
        """Raises InvalidChoice if a member's tensor is no longer its slice of the stack."""
        first, step = self.whole.data_ptr(), self.whole.stride(0) * self.whole.element_size()
        if any(member.data_ptr() != first + n * step for n, member in enumerate(self.members) if member.numel()):
            raise InvalidChoice(
                f"{name} of a stacked member lies elsewhere than when the Trainer was made (by .to(), .half() or assigning to "
                f".data?), so the stack would not see its updates; make the Trainer afterwards, or {_REMEDY}"
            )

    def deal(self) -> None:
        """Give the gradient that has come to the stack to the members."""
        gradient, self.whole.grad = self.whole.grad, None
        if gradient is None:  # it had no part in the losses
            return
        for member, own in zip(self.members, gradient.unbind()):
            if member.grad is None:
                member.grad = own
            else:
                member.grad.add_(own)


@dataclass
class _Part:
    """What a member brings to a micro-batch, and what has come of it."""

    batch: Batch
    output: Tensor | None = None
    loss: Tensor | None = None
    done: bool = False  # its gradient is in place


class Stack:
    """The bodies of N members as one computation.

    stacked: whether they compute so; None: yet to be measured. seconds: the least that a micro-batch of all members took
    (stacked, in a loop), where that was measured.
    """

    def __init__(self, bodies: Sequence[nn.Module], stacked: bool | None = True, tried: bool = True) -> None:
        self.stacked, self._tried = stacked, tried
        self.seconds: tuple[float, float] | None = None
        self._body = bodies[0]
        self._weights = _rows([dict(body.named_parameters()) for body in bodies])
        self._buffers = _rows([dict(body.named_buffers()) for body in bodies])
        self._members: list[Weights] = []

    def bind(self, members: Sequence[Weights]) -> None:
        """Once the members have optimizers: these are they, in the order of the replicas. Raises InvalidChoice if something is
        done around their computations."""
        self._members = list(members)
        for weights in members:
            weights.stack = self
        if any(weights.worker.guard is not None or weights.worker.lens is not None for weights in members):
            if self.stacked:
                raise InvalidChoice(
                    f"This consensus rule does something around every replica's computations ({type(members[0]).__name__}), so "
                    f"they cannot be stacked; {_REMEDY}"
                )
            self.stacked = False

    # ---- what a worker does ----------------------------------------------------------------------------------------

    async def chosen(self, worker: Worker, batch: Batch, weights: Weights) -> bool:
        """Whether the members compute stacked; the first time, if that is to be measured, measured with this batch."""
        if self.stacked is None:
            weights.flight = _Part(batch)
            await _meet(worker)
            if self.stacked is None:  # whoever goes on first
                self.stacked = worker.compute(self._is_faster, ())
        return self.stacked

    async def step(self, worker: Worker, stage: Stage, batch: Batch, weights: Weights) -> None:
        """A worker's program for one micro-batch. Whoever goes on first computes for all: the others' F and B are short."""
        part = weights.flight = _Part(batch)
        await weights.read()
        await _meet(worker)
        output = await worker.run("F", self._output, part)
        part.loss = await worker.run("L", objective, worker, stage, output, batch)
        del output
        await _meet(worker)
        await worker.run("B", self._backward, part)
        weights.flight = None
        del part
        await weights.write()

    def _output(self, mine: _Part) -> Tensor:
        """The body's output for the member that brought this part."""
        if mine.output is None:
            parts: list[_Part] = [weights.flight for weights in self._members]
            for part, output in zip(parts, self.forward([part.batch.x for part in parts])):
                part.output = output
        assert mine.output is not None
        return mine.output

    def _backward(self, mine: _Part) -> None:
        """The gradients of all members, unless they are in place."""
        if mine.done:
            return
        parts: list[_Part] = [weights.flight for weights in self._members]
        self.backward([part.loss for part in parts if part.loss is not None])
        for part in parts:
            part.output = part.loss = None
            part.done = True

    # ---- computing -------------------------------------------------------------------------------------------------

    def forward(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The members' outputs for their inputs, which must have one shape. Raises InvalidChoice."""
        for name, row in (*self._weights.items(), *self._buffers.items()):
            row.refuse_moved(name)
        shapes = {tuple(x.shape) for x in inputs}
        if len(shapes) > 1:
            raise InvalidChoice(
                f"Members that are stacked need batches of one shape, got {sorted(shapes)}; give equal ones, or {_REMEDY}"
            )
        if not self._tried:
            self._tried = True
            _try(self._body, inputs[0])
        try:
            outputs = torch.vmap(self._one)(_wholes(self._weights), _wholes(self._buffers), torch.stack(list(inputs)))
        except RuntimeError as error:
            if not re.search("vmap|[Bb]atching rule|functorch", str(error)):
                raise
            raise _cannot(error) from error
        return outputs.unbind()

    def _one(self, weights: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(self._body, (weights, buffers), (x,))

    def backward(self, losses: Sequence[Tensor]) -> None:
        """The gradients of the members' losses, added to their parameters' own."""
        try:
            torch.autograd.backward(losses)
        except BaseException:
            for row in self._weights.values():
                row.whole.grad = None  # half of a sum: the next step must not add to it
            raise
        for row in self._weights.values():
            row.deal()

    # ---- measuring -------------------------------------------------------------------------------------------------

    def _is_faster(self) -> bool:
        """Try both ways on the batches that the members brought; their weights, buffers and gradients stay as they are."""
        stages = [weights.stage for weights in self._members]
        batches: list[Batch] = [weights.flight.batch for weights in self._members]
        ways = [lambda: self._stacked_once(stages, batches), lambda: _loop_once(stages, batches)]
        times: list[list[float]] = [[], []]
        try:
            with buffers_kept(part for stage in stages for part in stage.modules()):
                for _ in range(1 + _TIMES):  # one to warm up
                    for way, row in zip(ways, times):
                        row.append(_seconds(way, batches[0].x.device))
        except InvalidChoice:
            return False
        finally:
            for weights in self._members:
                weights._drop_gradients()
        self.seconds = (min(times[0]), min(times[1]))  # what disturbs makes a time longer, never shorter
        return self.seconds[0] < self.seconds[1]

    def _stacked_once(self, stages: Sequence[Stage], batches: Sequence[Batch]) -> None:
        outputs = self.forward([batch.x for batch in batches])
        self.backward([_loss(stage, h, batch) for stage, h, batch in zip(stages, outputs, batches)])


def _loop_once(stages: Sequence[Stage], batches: Sequence[Batch]) -> None:
    for stage, batch in zip(stages, batches):
        _loss(stage, stage.body(batch.x), batch).backward()


def _loss(stage: Stage, h: Tensor, batch: Batch) -> Tensor:
    return stage.judge(stage.read(h), batch)


def _seconds(way: Callable[[], None], device: torch.device) -> float:
    begin = time.perf_counter()
    way()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


async def _meet(worker: Worker) -> None:
    """Wait until all replicas are here. Nothing travels: they share their memory."""
    await worker.replicas.gather("stacked", torch.empty(0))


def _rows(members: Sequence[dict[str, Tensor]]) -> dict[str, _Row]:
    return {name: _Row([tensors[name] for tensors in members]) for name in members[0]}


def _wholes(rows: dict[str, _Row]) -> dict[str, Tensor]:
    return {name: row.whole for name, row in rows.items()}


# ---- what can be stacked ---------------------------------------------------------------------------------------------


def refuse(chains: Sequence[Chain], consensus: Consensus, world: World) -> None:
    """Raises InvalidChoice if the members cannot compute as one; the sentence says why."""
    if len(chains[0]) > 1:
        raise InvalidChoice(
            f"Members are stacked as whole networks, this one is cut into {len(chains[0])} stages; give it one stage, or "
            f"{_REMEDY}"
        )
    if world.crew.size > 1:
        raise InvalidChoice(
            f"Stacked members live in one process, got {world.crew.size}; use the world InProcess(), or {_REMEDY}"
        )
    if getattr(world, "timed", False) or getattr(world, "_streams", None) is not None:
        raise InvalidChoice(
            "Stacked members compute as one, so a clock or a stream for each of them has no meaning, got "
            f"{type(world).__name__} with one; use InProcess(), or {_REMEDY}"
        )
    if consensus.one_at_a_time or consensus.needs_processes:
        raise InvalidChoice(
            f"Under {consensus.name} the replicas compute at different times, so they cannot be stacked; use another consensus "
            f"rule (independent, wash, all-reduce), or {_REMEDY}"
        )
    if chains[0].like is not None:
        _try(chains[0][0].body, chains[0].like)


def _try(body: nn.Module, x: Tensor) -> None:
    """Compute two copies of the network both ways. Raises InvalidChoice if stacked it cannot be done, or not the same."""
    plain, *members = (copy.deepcopy(body) for _ in range(3))
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        try:
            plain(x)
        except Exception:
            return  # whatever it is, it has nothing to do with stacking: training will say it
        try:
            outputs = Stack(members).forward([x, x])
            torch.autograd.backward([h.square().mean() for h in outputs])
        except InvalidChoice:
            raise
        except Exception as error:
            raise _cannot(error) from error
    before, after = dict(body.named_buffers()), dict(members[0].named_buffers())
    for name, here in plain.named_buffers():
        if torch.equal(before[name], here) != torch.equal(before[name], after[name]):
            raise InvalidChoice(
                f"The network's buffer {name!r} is replaced by its forward, and not changed in place, so stacked members would "
                f"not keep it; write it in place (copy_), or {_REMEDY}"
            )


def _cannot(error: Exception) -> InvalidChoice:
    """The sentence, with the module and the operation as far as they are known."""
    said = str(error)
    operation = re.search(r"aten::\w+", said)
    what = (
        "random numbers (dropout)"
        if "random" in said
        else operation[0]
        if operation
        else repr((said.strip() or type(error).__name__).splitlines()[0][:200])
    )
    where = "".join(f" in its {module}" for module in list(_modules_of(error))[-1:])
    return InvalidChoice(
        f"This network cannot compute for several members at once, because of {what}{where}; take that out, or {_REMEDY}"
    )


def _modules_of(error: Exception) -> Iterator[str]:
    """The modules in whose code the error came up, from the outside in."""
    trace = error.__traceback__
    while trace is not None:
        here = trace.tb_frame.f_locals.get("self")
        if isinstance(here, nn.Module):
            yield type(here).__name__
        trace = trace.tb_next
