"""Pictures of what was measured, in the style of the reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unlocked.report.drawing import COLOURS, RC, log_ticks, looks, whole_ticks

from .rounding import PRECISIONS

Rows = list[dict[str, Any]]


def draw(folder: Path, rounding: Rows, delays: Rows, cosines: Rows) -> list[Path]:
    """Write the pictures into `folder`; returns their paths."""
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    with matplotlib.rc_context(RC):
        gpt = [row for row in rounding if row["model"] == "revgpt"]
        files += [_rounding(folder, gpt)] if gpt else []
        files += [_delays(folder, delays)] if delays else []
        for stages in sorted({row["stages"] for row in cosines}):
            files.append(_cosines(folder, stages, [row for row in cosines if row["stages"] == stages]))
    return files


def _axes(x: str, y: str) -> Any:
    from matplotlib.figure import Figure

    axes = Figure(figsize=(6.0, 3.4), layout="constrained").add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return axes


def _saved(axes: Any, file: Path) -> Path:
    axes.legend(frameon=False, fontsize=8.5)
    axes.figure.savefig(file, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    file.write_text("\n".join(line.rstrip() for line in file.read_text().splitlines()) + "\n")
    return file


def _rounding(folder: Path, rows: Rows) -> Path:
    axes = _axes("couplings", "relative error of the lowest input")
    for precision, look in looks(list(PRECISIONS)).items():
        x, y = [row["reversible"] for row in rows], [row[precision]["lowest"] for row in rows]
        axes.plot(x, y, color=look.colour, linestyle=_dashes(look.dashes), marker="o", markersize=3.5, label=precision)
    axes.set_yscale("log")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    return _saved(axes, folder / "reconstruction-rounding.svg")


def _dashes(dashes: tuple[float, ...]) -> Any:
    return (0, dashes) if dashes else "-"


def _delays(folder: Path, rows: Rows) -> Path:
    """One point for each stage of each training."""
    axes = _axes("updates between forward and backward", "relative error of the lowest reversible input")
    rates, ks = sorted({row["lr"] for row in rows}), sorted({row["k"] for row in rows})
    for a, lr in enumerate(rates):
        for b, k in enumerate(ks):
            mine = [row for row in rows if row["lr"] == lr and row["k"] == k and row["delay"] > 0]
            x, y = [row["delay"] for row in mine], [row["error"] for row in mine]
            marker = ("o", "^", "s", "D")[b % 4]
            axes.plot(x, y, marker, color=COLOURS[a], markersize=4, alpha=0.7, label=f"γ = {lr:g}, k = {k}")
    log_ticks(axes)
    return _saved(axes, folder / "reconstruction-delay.svg")


def _cosines(folder: Path, stages: int, rows: Rows) -> Path:
    axes = _axes("stage", "cosine to backpropagation's gradient")
    for name, look in looks(list(dict.fromkeys(row["method"] for row in rows))).items():
        mine = [row for row in rows if row["method"] == name]
        x, y = [row["stage"] for row in mine], [row["cosine"] for row in mine]
        axes.plot(x, y, color=look.colour, linestyle=_dashes(look.dashes), marker="o", markersize=3.5, label=name)
    whole_ticks(axes, 10)
    return _saved(axes, folder / f"cosine-{stages}.svg")
