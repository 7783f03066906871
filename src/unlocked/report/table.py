"""The table of methods; a click on a header sorts it."""

from __future__ import annotations

import html

from .drawing import Look, key
from .study import Method, Study
from .words import bytes_text, number_text, percent_text, probed_words

# heading, its explanation
COLUMNS = (
    ("Accuracy, %", "on held-out data, mean ± standard deviation over the seeds"),
    ("Ensemble, %", "accuracy of the mean of the replicas' predictions, mean over the seeds"),
    ("All heads, %", "accuracy of the layerwise ensemble of all stages' heads, mean over the seeds"),
    ("Samples/s", "of training, as it was run"),
    ("Peak activations", "bytes kept for backward at the worst moment of the first step"),
    ("Up", "bytes of activations between stages, per update and replica"),
    ("Down", "bytes of gradients between stages, per update and replica"),
    ("Between replicas", "bytes between replicas, per update and replica"),
    ("Seconds", "of training, one run"),
    ("Runs", "seeds that count here"),
)


def table(study: Study, looks: dict[str, Look]) -> str:
    """The table with its caption."""
    heads = "".join(
        f'<th scope="col" aria-sort="none"><button type="button" title="{html.escape(words)}">{name}</button></th>'
        for name, words in (("Method", "credit rule / consensus rule @ replicas"), *COLUMNS)
    )
    rows = "".join(_row(method, looks[method.name]) for method in study.methods)
    text = (
        "Click a header to sort. Accuracy of several replicas is that of their averaged network; ensemble is that of "
        f"their mean prediction.{probed_words(study.methods)} Up, Down and Between replicas are bytes sent per update and "
        "replica. Rest the pointer on a number for its exact value; – means not known or not applicable."
    )
    return (
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
        f'<p class="caption">{html.escape(text)}</p>'
    )


def _row(method: Method, look: Look) -> str:
    n = method.numbers
    failed = f'<small class="failed" title="{html.escape(method.failed)}">failed</small>' if method.failed else ""
    cells = [
        _cell(method.accuracy, percent_text(method.accuracy, method.spread)),
        _cell(method.ensemble, percent_text(method.ensemble)),
        _cell(method.layerwise, percent_text(method.layerwise)),
        _cell(n["samples_per_second"], number_text(n["samples_per_second"])),
        *(_cell(n[k], bytes_text(n[k])) for k in ("activation_peak", "bytes_up", "bytes_down", "bytes_replicas")),
        _cell(n["seconds"], number_text(n["seconds"])),
        _cell(method.count, str(method.count)),
    ]
    name = html.escape(method.name)
    return f'<tr><th scope="row" data-value="{name}">{key(look)}{name}{failed}</th>{"".join(cells)}</tr>'


def _cell(value: float | None, text: str) -> str:
    exact = "" if value is None else repr(value)
    return f'<td data-value="{exact}" title="{exact or "not known"}">{html.escape(text)}</td>'
