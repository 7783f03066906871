"""Numbers as people read them, and the sentences of the summary. All texts here are plain, not yet escaped."""

from __future__ import annotations

from collections.abc import Callable

from .study import Method, Study


def bytes_text(value: float | None) -> str:
    """Bytes in decimal units with three digits, `0` for zero, `–` for unknown."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def bytes_unit(top: float) -> tuple[float, str]:
    """Bytes per unit, and the unit, for an axis that goes up to `top`."""
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if top >= scale:
            return scale, unit
    return 1.0, "bytes"


def percent_text(value: float | None, spread: float | None = None) -> str:
    """A share as per cent with two digits, with its spread if there is one."""
    if value is None:
        return "–"
    return f"{100 * value:.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}")


def number_text(value: float | None) -> str:
    """Three digits, thousands apart."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def several(count: int, noun: str) -> str:
    """`1 seed`, `2 seeds`, `2 processes`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}{'es' if noun.endswith('s') else 's'}"


def listed(names: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def probed_words(methods: list[Method]) -> str:
    """A sentence about accuracies that are those of linear probes, to follow others; empty if there are none."""
    names = [method.name for method in methods if method.probed]
    if not names:
        return ""
    whose = "It is" if len(names) == len(methods) else f"That of {listed(names)} is"
    specs = {run.config.get("probe_on") for method in methods if method.probed for run in method.runs} - {None}
    images = f" of {listed(sorted(map(str, specs)))}" if specs else ""
    return f" {whose} of a linear probe, fitted to frozen features{images}: the network learned without labels."


def title(study: Study) -> str:
    """The title of the report."""
    data = study.config.get("data")
    on = f" on {data}" if isinstance(data, str) else ""
    return (
        f"{several(len(study.methods), 'method')} compared{on}" if study.comparison else f"{study.methods[0].name}{on}"
    )


def summary(study: Study) -> str:
    """One paragraph: what was done and what came of it; only what the files say."""
    sentences = [_setting(study)]
    if study.comparison and len(study.methods) > 1:
        sentences += _bests(study.methods)
    else:
        sentences += _single(study.methods[0])
    return " ".join(sentence for sentence in sentences if sentence)


def _setting(study: Study) -> str:
    config = study.config
    what = (
        f"{several(len(study.methods), 'method')} trained" if study.comparison else f"{study.methods[0].name} trained"
    )
    model, data = config.get("model"), config.get("data")
    parts = [what, str(model) if model else "a network"]
    if config.get("stages"):
        parts.append(f"in {several(_whole(config['stages']), 'stage')}")
    if data:
        parts.append(f"on {data}")
    if config.get("epochs"):
        parts.append(f"for {several(_whole(config['epochs']), 'epoch')}")
    if study.comparison:
        runs = sum(len(method.runs) for method in study.methods)
        seeds = {run.seed for method in study.methods for run in method.runs}
        parts.append(f"({several(len(seeds), 'seed')}, {several(runs, 'run')} in all)")
    elif "seed" in config:
        parts.append(f"(seed {config['seed']})")
    return " ".join(parts) + "."


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0


def _bests(methods: list[Method]) -> list[str]:
    sentences = []
    ranked = _ranked(methods, lambda m: None if m.accuracy is None else -m.accuracy)
    if ranked:
        best = ranked[0]
        kind = "Best mean accuracy" if best.count > 1 else "Best accuracy"
        names = _equals(ranked, lambda m: m.accuracy)
        sentence = f"{kind}: {names}, {percent_text(best.accuracy, best.spread)} %"
        close = [m for m in ranked[1:] if best.spread and m.accuracy != best.accuracy and _within(m, best)]
        sentences.append(sentence + (f"; within one standard deviation of it: {_names(close)}." if close else "."))
    sentences.append(_least(methods, "activation_peak", "Least memory for activations"))
    speed = _ranked(methods, lambda m: _negative(m.numbers["samples_per_second"]))
    if speed:
        sentences.append(
            f"Most samples per second as run here: {speed[0].name}, {number_text(speed[0].numbers['samples_per_second'])}."
        )
    silent = [m for m in methods if m.numbers["bytes_down"] == 0]
    talking = any(m.numbers["bytes_down"] for m in methods)
    if silent and talking:
        sentences.append(f"Nothing comes back down between stages in {_names(silent)}.")
    failed = [m for m in methods if m.failed]
    if failed:
        sentences.append(f"Failed: {_names(failed)}.")
    return sentences


def _single(method: Method) -> list[str]:
    sentences = []
    if method.accuracy is not None:
        whose = "of a linear probe of its features " if method.probed else ""
        sentences.append(f"Accuracy {whose}on held-out data: {percent_text(method.accuracy, method.spread)} %.")
    if method.ensemble is not None:
        sentences.append(f"The ensemble of its replicas reaches {percent_text(method.ensemble)} %.")
    peak, speed = method.numbers["activation_peak"], method.numbers["samples_per_second"]
    if peak is not None:
        sentences.append(f"It kept at most {bytes_text(peak)} of activations for backward.")
    if speed is not None:
        sentences.append(f"It went through {number_text(speed)} samples per second.")
    return sentences


def _least(methods: list[Method], key: str, words: str) -> str:
    ranked = _ranked(methods, lambda m: m.numbers[key])
    if len(ranked) < 2:
        return ""
    low, high = ranked[0].numbers[key] or 0.0, ranked[-1].numbers[key] or 0.0
    names = _equals(ranked, lambda m: m.numbers[key])
    most = _names([method for method in ranked if method.numbers[key] == high])
    if low == high:
        return f"{words}: the same in all methods, {bytes_text(low)}."
    return f"{words}: {names}, {bytes_text(low)} at the peak (the most: {most}, {bytes_text(high)})."


def _ranked(methods: list[Method], key: Callable[[Method], float | None]) -> list[Method]:
    known = [(value, method) for method in methods if (value := key(method)) is not None]
    return [method for _, method in sorted(known, key=lambda pair: pair[0])]


def _equals(ranked: list[Method], key: Callable[[Method], float | None]) -> str:
    """The names of all that share the first one's value."""
    return _names([method for method in ranked if key(method) == key(ranked[0])])


def _within(method: Method, best: Method) -> bool:
    return (best.accuracy or 0.0) - (method.accuracy or 0.0) <= (best.spread or 0.0)


def _negative(value: float | None) -> float | None:
    return None if value is None else -value


def _names(methods: list[Method]) -> str:
    return listed([method.name for method in methods])
