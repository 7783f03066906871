"""What was set, with which versions on which machine, and the command that repeats it."""

from __future__ import annotations

import html
import json
from typing import Any

from .study import Study

SHOWN_APART = ("command", "versions", "machine", "heads", "methods")


def settings(study: Study) -> str:
    """The command in the open, everything else folded."""
    config = study.config
    if not config:
        return '<p class="missing">config.json is missing: settings, versions and command are not known.</p>'
    command = config.get("command")
    parts = [
        f"<pre>{html.escape(_text(command))}</pre>"
        if command
        else '<p class="missing">The command that made this was not recorded.</p>'
    ]
    for name in ("versions", "machine"):
        if not config.get(name):
            parts.append(f'<p class="missing">The {name} {"were" if name == "versions" else "was"} not recorded.</p>')
    for name in ("machine", "versions"):
        if config.get(name):
            parts.append(f"<p><b>{name.capitalize()}:</b> {html.escape(_inline(config[name]))}</p>")
    rest = {key: value for key, value in config.items() if key not in SHOWN_APART}
    parts.append(_folded("Settings" + (" shared by all methods" if study.comparison else ""), _rows(rest)))
    parts += _heads(study)
    return "".join(parts)


def _heads(study: Study) -> list[str]:
    """What was said about the auxiliary heads of each method, from its first run."""
    rows = {method.name: method.runs[0].config.get("heads") for method in study.methods if method.runs}
    known = {name: heads for name, heads in rows.items() if heads}
    if not known:
        return []
    items = "".join(
        f"<h4>{html.escape(name)}</h4><ul>{''.join(f'<li>{html.escape(_text(line))}</li>' for line in _list(heads))}</ul>"
        for name, heads in known.items()
    )
    return [_folded("Auxiliary heads", items)]


def _folded(heading: str, body: str) -> str:
    return f"<details><summary>{html.escape(heading)}</summary>{body}</details>"


def _rows(values: dict[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(_inline(value))}</td></tr>'
        for name, value in values.items()
    )
    return f'<table class="settings"><tbody>{rows}</tbody></table>'


def _inline(value: Any) -> str:
    """Nested settings on one line: `cpu x86, cores 2`."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_inline(entry)}" for name, entry in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(_inline(entry) for entry in value) or "none"
    return _text(value)


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
