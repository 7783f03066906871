"""What spreads the runs of a benchmark and keeps their lines (benchmarks/logged_runs.py)."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
LOGS = BENCHMARKS.parent / "docs" / "results" / "logs"


@pytest.fixture
def runs(monkeypatch):
    """The module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("logged_runs")


def cube(task: int, offset: int) -> int:
    if task == 1:
        raise ArithmeticError("not this one")
    return task**3 + offset


@pytest.mark.timeout(60)
def test_a_run_that_fails_does_not_lose_the_lines_of_the_others(runs, tmp_path, capsys):
    log, seen = tmp_path / "new" / "log.jsonl", []
    with pytest.raises(ArithmeticError, match="not this one"):
        for task, row in runs.finished(cube, [0, 1, 2, 3], (5,), jobs=2):
            runs.append(log, [{"task": task, "row": row, "settings": {"a": 1}}])
            seen.append(task)
            assert len(log.read_text().splitlines()) == len(seen)  # at once
    assert sorted(seen) == [0, 2, 3] and "1 failed: ArithmeticError" in capsys.readouterr().out
    known = {line["task"]: line["row"] for line in runs.read(log, {"a": 1})}
    assert known == {0: 5, 2: 13, 3: 32} and runs.read(log, {"a": 2}) == []
    assert list(runs.finished(cube, [task for task in (0, 2, 3) if task not in known], (5,))) == []


def test_a_torn_last_line_is_told_of_and_costs_no_other_one(runs, tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    log.write_text('{"task": 0}\n{"tas')
    assert runs.read(log) == [{"task": 0}]
    assert runs.append(log, [{"task": 1}, {"task": 2}]) == [{"task": 1}, {"task": 2}]
    assert runs.read(log) == [{"task": k} for k in range(3)]
    assert "log.jsonl, line 2 is torn and left out" in capsys.readouterr().out
    assert runs.read(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("name", ["forward_gradients", "self_supervised"])
def test_logs_that_are_kept_are_read(runs, name):
    lines = [json.loads(line) for line in (LOGS / f"{name}.jsonl").read_text().splitlines()]
    mine = lines[0]["settings"]
    found = runs.read(LOGS / f"{name}.jsonl", mine)
    assert found and found == [line for line in lines if line["settings"] == mine]
