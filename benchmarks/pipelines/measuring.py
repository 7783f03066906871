"""All variants of all tasks in one set of processes: what each process runs, and what is made of it."""

from __future__ import annotations

import os
from contextlib import ExitStack
from statistics import mean, median
from typing import Any, NamedTuple

import torch.distributed as dist

from .balancing import balanced
from .crew import Member
from .tasks import Task, tasks
from .torch_schedules import best_schedules, start_torch
from .variants import Library, library_variants, single_variants, stages_alone, step_flops
from .windows import Variant, play, rates, ratio, warm_up


class Plan(NamedTuple):
    """What to measure: names of tasks, kind of head, rounds, seconds of a window."""

    models: list[str]
    head: str
    rounds: int
    seconds: float


def measure(member: Member, plan: Plan) -> dict[str, Any]:
    """Everything, by task. Called on every process; the numbers are the same on all of them."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", member.cluster.interface.name)
    start_torch(member)
    found: dict[str, Any] = {}
    for task in tasks(plan.models, plan.head):
        with ExitStack() as worlds:
            found[task.name] = _measure_task(member, task, plan, worlds)
        if member.cluster.chief:
            print(describe(task.name, found[task.name]), flush=True)
    member.cluster.barrier()
    dist.destroy_process_group()
    return {"tasks": found, "freed_memory_kept": all(member.cluster.share(member.kept))}


def _measure_task(member: Member, task: Task, plan: Plan, worlds: ExitStack) -> dict[str, Any]:
    splits = balanced(member.cluster, task, member.cluster.size)
    flops = step_flops(task, splits)
    libraries = library_variants(member, task, splits, worlds)
    schedules, tried = best_schedules(member, task, splits.passing, plan.seconds / 2)
    alone = stages_alone(member, task, splits.local)
    variants = [
        *single_variants(member, task, splits),
        alone,
        *(Variant(name, library.step, len(task.x)) for name, library in libraries.items()),
        *schedules,
    ]
    warm_up(member, variants, plan.seconds)
    play(member, variants, plan.rounds)
    speed = rates(member, variants)
    stages = member.cluster.share(round(1e3 * median(own / steps for steps, own, _ in alone.rows), 2))
    return {
        "batch": len(task.x),
        "stage_pieces": {name: recipe["sizes"] for name, recipe in splits._asdict().items()},
        "heads": libraries["dgl"].heads,
        "samples_per_second": {name: round(median(row), 1) for name, row in speed.items()},
        "steps_per_window": {variant.name: variant.steps for variant in variants},
        "stage_ms": stages,
        "balance": round(mean(stages) / max(stages), 4),
        "micro_batches": {name: round(rate, 1) for name, rate in tried.items()},
        "flops": flops,
        "ratios": _ratios(speed, flops),
        "bytes_per_step": _bytes(member, libraries),
    }


def _ratios(speed: dict[str, list[float]], flops: dict[str, int]) -> dict[str, float]:
    """What the issue asks for, first our aims; each the median over rounds of a ratio within a round."""
    best = max(("torch GPipe", "torch 1F1B"), key=lambda name: median(speed[name]))
    one, several = list(speed)[:2]
    share = flops["dgl"] / flops["backprop"]
    return {
        "dgl / independent dgl": ratio(speed, "dgl", "independent dgl"),
        "dgl / (independent backprop · FLOPs)": round(share * ratio(speed, "dgl", "independent backprop"), 4),
        "dgl / best torch schedule": ratio(speed, "dgl", best),
        "dgl / stages alone": ratio(speed, "dgl", "stages alone"),
        "stages alone / independent dgl": ratio(speed, "stages alone", "independent dgl"),
        "best torch schedule / independent backprop": ratio(speed, best, "independent backprop"),
        "independent backprop / 1 thread": ratio(speed, "independent backprop", one),
        "independent dgl / independent backprop": ratio(speed, "independent dgl", "independent backprop"),
        f"{several.split(', ')[1]} / 1 thread": ratio(speed, several, one),
        **{
            f"{name} / 1 thread": ratio(speed, name, one)
            for name in ("dgl", "interlocking(1)", "backprop", "torch GPipe", "torch 1F1B")
        },
    }


def _bytes(member: Member, libraries: dict[str, Library]) -> dict[str, Any]:
    """By method: payload (checked against the prediction) and wire bytes of each process, per step."""
    return {name: member.cluster.share(library.check_bytes()) for name, library in libraries.items()}


def describe(name: str, row: dict[str, Any]) -> str:
    """A few lines for people."""
    stages = " : ".join(f"{ms:.1f}" for ms in row["stage_ms"])
    lines = [
        f"{name}, batch {row['batch']}; pieces {row['stage_pieces']}",
        f"    stages of dgl alone {stages} ms (mean / slowest {row['balance']:.3f}); FLOPs {row['flops']}",
    ]
    lines += [f"    {what:28s} {rate:9.1f} samples/s" for what, rate in row["samples_per_second"].items()]
    lines += [f"    {what:44s} {value:6.3f}" for what, value in row["ratios"].items()]
    lines.append("    tried: " + ", ".join(f"{what} {rate:.0f}" for what, rate in row["micro_batches"].items()))
    for method, processes in row["bytes_per_step"].items():
        payload, wire = (sum(sum(told[what].values()) for told in processes) for what in ("payload", "wire"))
        lines.append(f"    {method} sends {payload:,} bytes per step, as predicted; {wire:,} on the wire")
    return "\n".join(lines)
