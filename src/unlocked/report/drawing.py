"""Figures as inline SVG: one style, colours that stay with their method, ids that never clash."""

from __future__ import annotations

import html
import io
import re
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's palette without yellow, then three of Tol's "muted" that differ from them in lightness
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#B87A00",
    "#3FA0D8",
    "#333333",
    "#882255",
    "#7A7A1F",
    "#5B3FA8",
)
DASHES = ((), (5, 2), (1.5, 1.5), (7, 2, 1.5, 2))
GREY = "#C9CED6"
INK = "#2B3240"

RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "unlocked",
    "text.parse_math": False,  # names may hold a dollar sign
    "font.size": 10,
    "axes.edgecolor": "#8A93A3",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E9EE",
    "grid.linewidth": 0.8,
    "xtick.color": "#566071",
    "ytick.color": "#566071",
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
}


class Look(NamedTuple):
    """How a method's lines are drawn, the same in every figure."""

    colour: str
    dashes: tuple[float, ...]


def looks(names: list[str]) -> dict[str, Look]:
    """A look for each method, by its place in the table: colour and dashes both differ between neighbours."""
    return {name: Look(COLOURS[k % len(COLOURS)], DASHES[k % len(DASHES)]) for k, name in enumerate(names)}


def whole_ticks(axes: Axes, count: int = 6) -> None:
    """Ticks of the x axis at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=count, integer=True))


def log_ticks(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers, and some of them even if it spans less than a decade."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")


class Sheet:
    """Makes the figures of one page."""

    def __init__(self) -> None:
        self._count = 0
        self._titles: list[str] = []

    def axes(self, width: float, height: float, margins: tuple[float, float, float, float]) -> Axes:
        """Axes on a new figure of so many points, with (left, bottom, right, top) points around them."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width / 72, height / 72))
        left, bottom, right, top = margins
        box = (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
        self._titles = []
        return figure.add_axes(box)

    def hover(self, artist: Any, title: str) -> None:
        """Show `title` while the pointer rests on the artist (of the figure made last)."""
        artist.set_gid(f"hover-{len(self._titles)}")
        self._titles.append(title)

    def svg(self, axes: Axes, label: str) -> str:
        """The figure as an SVG element that can stand in a page; `label` is read out in place of it."""
        figure: Figure = axes.figure  # type: ignore[assignment]
        figure.patch.set_visible(False)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        self._count += 1
        return _embed(stream.getvalue(), f"f{self._count}-", label, self._titles)


def _embed(text: str, prefix: str, label: str, titles: list[str]) -> str:
    """Keep the SVG element only, without sizes, name spaces and style rules; prefix its ids; put in the titles."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<style[^>]*>.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box is not None
    text = re.sub(
        r"<svg[^>]*>", f'<svg viewBox="{box[1]}" role="img" aria-label="{html.escape(label)}">', text, count=1
    )
    text = text.replace("xlink:href=", "href=")
    text = re.sub(
        r'<g id="hover-(\d+)">', lambda m: f'<g id="hover-{m[1]}"><title>{html.escape(titles[int(m[1])])}</title>', text
    )
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = text.replace('href="#', f'href="#{prefix}').replace("url(#", f"url(#{prefix}")
    return re.sub(r"\n\s*", "\n", text).strip()


def key(look: Look) -> str:
    """A short line as in the figures, for legends in the page."""
    dashes = f' stroke-dasharray="{" ".join(f"{2 * x:g}" for x in look.dashes)}"' if look.dashes else ""
    return (
        '<svg class="key" viewBox="0 0 30 10" aria-hidden="true">'
        f'<path d="M1 5H29" stroke="{look.colour}" stroke-width="3"{dashes}/></svg>'
    )


def heading(name: str, look: Look, aside: str = "") -> str:
    """A method's name above its own figure."""
    more = f' <span class="aside">{html.escape(aside)}</span>' if aside else ""
    return f"<h4>{key(look)}{html.escape(name)}{more}</h4>"


def legend(names: list[str], all_looks: dict[str, Look]) -> str:
    """The methods with their lines, as HTML."""
    items = "".join(f"<li>{key(all_looks[name])}{html.escape(name)}</li>" for name in names)
    return f'<ul class="legend">{items}</ul>'
