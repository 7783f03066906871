"""The tables of the comparison, as they stand in docs/results/forward_gradients.md."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from .cases import Case
from .orderings import Found, Scores, claims, tested
from .published import published

Line = dict[str, Any]
COSINE = "cosine of guess and target"  # how the notes of it begin (credit/two_backward.py)


def case_of(line: Line) -> Case:
    """The row that a line of the log belongs to."""
    return Case(*(line[name] for name in Case._fields))


def scores_of(lines: Sequence[Line]) -> Scores:
    """Accuracies in % by case and seed, of the runs that stayed finite."""
    found: dict[Case, dict[int, float]] = {}
    for line in lines:
        if line["accuracy"] is not None:
            found.setdefault(case_of(line), {})[line["seed"]] = 100 * line["accuracy"]
    return found


def accuracies(rows: Sequence[Case], lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds beside the thesis' number; a line for each row that has a run."""
    scores, told = scores_of(lines), []
    print("| stages | guess → target | learning rate | accuracy | seeds | thesis | s per run |")
    print("|---:|---|---:|---:|---:|---:|---:|")
    for case in sorted(rows, key=_place):
        runs = [line for line in lines if case_of(line) == case]
        if not runs:
            continue
        values = list(scores.get(case, {}).values())
        seconds = [run["processor seconds"] for run in runs if "processor seconds" in run]
        row = case._asdict() | {"rate": runs[0]["rate"], "seeds": len(runs), "lost": len(runs) - len(values)}
        row |= {"accuracy": spread(values), "published": published(case), "seconds": statistics.fmean(seconds or [0])}
        told.append(row)
        ours = "lost" if not values else "{:.1f} ± {:.1f}".format(*row["accuracy"])
        print(
            f"| {case.stages} | {case.label} | {row['rate']:g} | {ours} | {len(values)} | {row['published'] or '–'} "
            f"| {row['seconds']:.0f} |"
        )
    return told


def _place(case: Case) -> tuple[Any, ...]:
    """In the order of the thesis' tables; wider and narrower networks last."""
    targets, guesses = ("end to end", "global", "local", "intermediate"), ("itself", "local", "ntk", "fixed-ntk")
    guess = guesses.index(case.guess) if case.guess in guesses else len(guesses)
    return (case.width != 1, case.width, case.stages, targets.index(case.target), guess, case.guess, case[3:])


def spread(values: Sequence[float]) -> tuple[float, float] | None:
    """Mean and standard deviation."""
    return (statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0) if values else None


def orderings(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Every claim with the pairs that were run: the mean difference over the seeds ± its standard error."""
    scores, told = scores_of(lines), []
    print("\n| claim | better, worse | thesis | ours | verdict |\n|---|---|---:|---:|---|")
    for claim, pairs in claims().items():
        found = [tested(pair, scores) for pair in pairs]
        for result in (result for result in found if result is not None and result.seeds > 1):
            told.append(_row_of(claim, result))
            row = told[-1]
            theirs = "–" if row["published"] is None else f"{row['published']:+.1f}"
            print(
                f"| {claim} | {row['better']}; {row['worse']} | {theirs} | {result.mean:+.1f} ± {result.error:.1f} "
                f"| {result.verdict} |"
            )
    _count(told)
    return told


def _row_of(claim: str, found: Found) -> dict[str, Any]:
    theirs = [published(case) for case in found.pair]
    gap = None if None in theirs else theirs[0] - theirs[1]  # type: ignore[operator]
    names = [f"{case.label} ({case.stages})" for case in found.pair]
    numbers = {"mean": found.mean, "error": found.error, "seeds": found.seeds, "verdict": found.verdict}
    return {"claim": claim, "better": names[0], "worse": names[1], "published": gap, **numbers}


def _count(rows: Sequence[dict[str, Any]]) -> None:
    print("\n| claim | pairs | holds | not settled | reversed |\n|---|---:|---:|---:|---:|")
    for claim in dict.fromkeys(row["claim"] for row in rows):
        verdicts = [row["verdict"] for row in rows if row["claim"] == claim]
        counts = [verdicts.count(name) for name in ("holds", "not settled", "reversed")]
        print(f"| {claim} | {len(verdicts)} | {' | '.join(map(str, counts))} |")


def watched(lines: Sequence[Line]) -> None:
    """Cosine of guess and target, by stage, in the first and the last epoch of the seed that was watched."""
    print("\n| stages | guess → target | cosine of | epoch | stage 0, 1, … |\n|---:|---|---|---:|---|")
    for line in lines:
        notes = line.get("notes") or []
        for epoch in sorted({0, len(notes) - 1} if notes else ()):
            for name in notes[epoch]:
                if name.startswith(COSINE):
                    told = " ".join(f"{value:+.2f}" for value in notes[epoch][name] if value is not None)
                    what = name.removeprefix(COSINE).strip(", ")
                    print(f"| {line['stages']} | {case_of(line).label} | {what} | {epoch + 1} | {told} |")


def by_depth(lines: Sequence[Line], seed: int) -> None:
    """Training losses of the heads in the last epoch, by stage, of one seed (F Figure 4.2)."""
    print("\n| stages | guess → target | training loss of the heads, stage 0, 1, … |\n|---:|---|---|")
    for line in lines:
        losses = (line.get("training losses") or [[]])[-1]
        if line["seed"] == seed and line["width"] == 1 and sum(value is not None for value in losses) > 1:
            told = " ".join("–" if value is None else f"{value:.2f}" for value in losses)
            print(f"| {line['stages']} | {case_of(line).label} | {told} |")
