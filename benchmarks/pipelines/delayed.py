"""Pipelines with and without delayed gradients in one set of processes, each beside its stages without messages."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from statistics import mean, median
from typing import Any, NamedTuple

import unlocked as ul
from unlocked.timeline import BUSY, Timeline

from .alone import Way
from .balancing import by_time, improved, passing_seconds, steps_of
from .crew import Member
from .tasks import Task, tasks
from .variants import Library
from .windows import Variant, play, rates, ratio, warm_up

_WAYS: tuple[Way, ...] = ("graph", "input", "reverse")


class Plan(NamedTuple):
    """What to measure: names of tasks and methods, micro-batches per update, rounds, seconds of a window."""

    models: list[str]
    methods: list[str]
    micro_batches: int
    rounds: int
    seconds: float


class Split(NamedTuple):
    """Where to cut for stages of one way (alone.py): the recipe, and seconds of a step of each stage by itself."""

    recipe: dict[str, Any]
    seconds: list[float]

    @property
    def slowest(self) -> int:
        """The stage that bounds the pipeline."""
        return self.seconds.index(max(self.seconds))


class Method(NamedTuple):
    """A credit rule, how its stages work, and the micro-batches that the Trainer makes (0: the rule splits by itself)."""

    credit: Any
    way: Way = "graph"
    delayed: bool = True


def methods(micro_batches: int) -> dict[str, Method]:
    """All of them; a batch is so many micro-batches and one update, in each."""
    credit = ul.credit
    return {
        "torch-1f1b": Method(credit.TorchOneFOneB(micro_batches), delayed=False),
        "torch-gpipe": Method(credit.TorchGPipe(micro_batches), delayed=False),
        "gpipe": Method(credit.GPipe(micro_batches), delayed=False),
        "1f1b": Method(credit.OneFOneB(micro_batches), delayed=False),
        "pipedream": Method(credit.PipeDream()),
        "pipedream-2bw": Method(credit.PipeDream2BW()),
        "delayed-gradients": Method(credit.DelayedGradients()),
        "features-replay": Method(credit.FeaturesReplay(), "input"),
        "fdg": Method(credit.FDG()),
        "petra": Method(credit.PETRA(), "reverse"),
    }


def measure(member: Member, plan: Plan) -> dict[str, Any]:
    """Everything, by task. Called on every process; the numbers are the same on all of them."""
    found = {}
    for task in tasks(plan.models, "mlp"):
        with ExitStack() as worlds:
            found[task.name] = _measure_task(member, task, plan, worlds)
        member.tell(describe(task.name, found[task.name]))
    return {"tasks": found, "freed_memory_kept": all(member.cluster.share(member.kept))}


def _measure_task(member: Member, task: Task, plan: Plan, worlds: ExitStack) -> dict[str, Any]:
    member.tell(f"{task.name}: balancing")
    splits = _splits(member, task, plan.micro_batches)
    known = {name: method for name, method in methods(plan.micro_batches).items() if name in plan.methods}
    trainings = {name: _library(member, task, plan, splits, method, worlds) for name, method in known.items()}
    lead = math.ceil(2 * (member.cluster.size - 1) / plan.micro_batches)
    bounds = [_bound(member, task, way, split, plan.micro_batches) for way, split in splits.items()]
    variants = bounds + [Variant(name, x.step, len(task.x), "slowest", lead=lead) for name, x in trainings.items()]
    member.tell(f"{task.name}: warming up")
    warm_up(member, variants, plan.seconds)
    member.tell(f"{task.name}: measuring")
    play(member, variants, plan.rounds)
    steps = {variant.name: variant.steps for variant in variants}
    times = {name: _times(member, x.session.recent, steps[name], lead) for name, x in trainings.items()}
    for training in trainings.values():
        training.session.drain()
    return _told(task, splits, known, rates(member, variants), times)


def _splits(member: Member, task: Task, parts: int) -> dict[Way, Split]:
    """The best split for each way, as rank 0 measures it while the others wait."""
    found: dict[Way, Split] = {}
    if member.cluster.chief:
        recipe = by_time(task, member.cluster.size)
        for way in _WAYS:
            recipe, seconds = improved(recipe, lambda given, way=way: passing_seconds(task, given, way, parts))
            found[way] = Split(recipe, seconds)
    return {way: Split(*split) for way, split in member.cluster.broadcast(found).items()}


def _library(
    member: Member, task: Task, plan: Plan, splits: dict[Way, Split], method: Method, worlds: ExitStack
) -> Library:
    accumulate = plan.micro_batches if method.delayed else 1
    return Library(member, task, splits[method.way].recipe, method.credit, worlds, accumulate=accumulate)


def _bound(member: Member, task: Task, way: Way, split: Split, parts: int) -> Variant:
    """All processes at once do the slowest stage's work, without messages; their mean rate.

    With more processes than cores each does its own stage instead, and it is over when all are: then the cores are the bound.
    """
    size, rank = member.cluster.size, member.cluster.rank
    if size > len(member.cores):
        return Variant(f"bound {way}", steps_of(task, split.recipe, rank, way, parts), len(task.x))
    step = steps_of(task, split.recipe, split.slowest, way, parts)
    return Variant(f"bound {way}", step, len(task.x) / size, "sum", lead=1)


def _times(member: Member, recent: Sequence[Timeline], steps: int, lead: int) -> list[dict[str, float]]:
    """Milliseconds of a step on each process in the last window: computing, waiting, sending, the rest (Python)."""
    timed = list(recent)[-(steps + lead) : len(recent) - lead]
    return member.cluster.share(_shares(timed))


def _shares(steps: list[Timeline]) -> dict[str, float]:
    acts = [act for step in steps for act in step]
    spent: Counter[str] = Counter()
    for act in acts:
        what = "computing" if act.kind in BUSY else "waiting" if act.kind == "R" else "sending"
        spent[what] += act.end - act.start
    spent["other"] = acts[-1].end - acts[0].start - sum(spent.values())
    return {what: round(1e3 * spent[what] / len(steps), 2) for what in ("computing", "waiting", "sending", "other")}


def _told(
    task: Task,
    splits: dict[Way, Split],
    known: dict[str, Method],
    speed: dict[str, list[float]],
    times: dict[str, list[dict[str, float]]],
) -> dict[str, Any]:
    return {
        "batch": len(task.x),
        "splits": {
            way: {
                "pieces": split.recipe["sizes"],
                "stage_ms": [round(1e3 * seconds, 2) for seconds in split.seconds],
                "balance": round(mean(split.seconds) / max(split.seconds), 4),
                "slowest": split.slowest,
                "bound": round(median(speed[f"bound {way}"]), 1),
                "bound_ms": round(1e3 * len(task.x) / median(speed[f"bound {way}"]), 2),
            }
            for way, split in splits.items()
        },
        "methods": {
            name: {
                "way": method.way,
                "samples_per_second": round(median(speed[name]), 1),
                "of_ceiling": ratio(speed, name, "bound graph"),
                "of_own_bound": ratio(speed, name, f"bound {method.way}"),
                "of_torch_1f1b": ratio(speed, name, "torch-1f1b") if "torch-1f1b" in speed else None,
                "ms": times[name],
            }
            for name, method in known.items()
        },
    }


def describe(name: str, row: dict[str, Any]) -> str:
    """Lines for people."""
    lines = [f"{name}, batch {row['batch']}"]
    for way, split in row["splits"].items():
        stages = " : ".join(f"{ms:.1f}" for ms in split["stage_ms"])
        lines.append(
            f"    {way:8s} pieces {split['pieces']}, stages alone {stages} ms (mean / slowest {split['balance']:.3f}), "
            f"bound {split['bound']:.0f} samples/s, {split['bound_ms']:.1f} ms"
        )
    lines.append(
        "    samples/s, share of the ceiling, of its own bound | ms of a step: computing waiting sending other, by process"
    )
    for method, told in row["methods"].items():
        split = row["splits"][told["way"]]
        parts = " | ".join(" ".join(f"{ms:6.1f}" for ms in process.values()) for process in told["ms"])
        more = told["ms"][split["slowest"]]["computing"] / split["bound_ms"]
        lines.append(
            f"    {method:18s} {told['samples_per_second']:8.1f} {told['of_ceiling']:6.3f} {told['of_own_bound']:6.3f}"
            f" | {parts} | slowest stage computes {more:.3f} × its bound"
        )
    return "\n".join(lines)
