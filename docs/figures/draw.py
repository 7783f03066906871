"""Redraws what docs/timelines.md shows: python docs/figures/draw.py [FOLDER for the pictures; this one]

The page itself says what is drawn: each `unlocked timeline … --to docs/figures/NAME.svg` in it is run, and the table below it
replaced by what comes out.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import sys
from pathlib import Path

from unlocked.cli import main

PAGE = Path(__file__).parent.parent / "timelines.md"
SHOWN = re.compile(r"```bash\nunlocked (timeline .*?)\n```\n\n```text\n.*?```", re.DOTALL)


def redraw(folder: Path) -> str:
    """Write the pictures of the page into `folder`; returns the page with its tables written anew."""
    return SHOWN.sub(lambda found: _redrawn(found[1], folder), PAGE.read_text())


def _redrawn(command: str, folder: Path) -> str:
    *words, to = shlex.split(command.replace("\\\n", " "))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main([*words, str(folder / Path(to).name), "--json"])
    if code:
        raise SystemExit(printed.getvalue())
    return f"```bash\nunlocked {command}\n```\n\n```text\n{json.loads(printed.getvalue())['table']}\n```"


if __name__ == "__main__":
    here = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    page = redraw(here)
    PAGE.write_text(page)
