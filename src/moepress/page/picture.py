"""A picture of the report: a matplotlib figure, its panels, and the style of all pictures.

A panel says where on the picture a grid of experts, or a set of points, lies. The page uses it to
show the numbers under the pointer.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

Format = Literal["svg", "png"]
Floats = npt.NDArray[np.float64]

WIDTH = 10.0  # inches
DPI = 200  # of a PNG
FEW_DECADES = 1000  # largest over smallest up to which a log axis has ticks at 1, 2, 5, 10, ...
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "moepress",  # fixed ids: equal pictures have equal bytes
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
}


@dataclass(frozen=True)
class Panel:
    """An area of a picture that reacts to the pointer; lengths are shares of the picture's size."""

    label: str
    left: float
    top: float
    width: float
    height: float
    # Either a grid of experts, (rows, columns), or points (x, y, lines of text); x and y are shares
    # of the panel from its top left corner.
    grid: tuple[int, int] | None = None
    points: tuple[tuple[float, float, tuple[str, ...]], ...] = ()


@dataclass(frozen=True)
class Picture:
    """A drawn figure with its panels."""

    name: str  # of its file, without extension
    title: str
    about: str  # a description in words, the alt text
    figure: Figure = field(repr=False)
    panels: tuple[Panel, ...]

    def image(self, form: str) -> bytes:
        """The picture as a file's bytes; equal pictures give equal bytes."""
        buffer = io.BytesIO()
        self.figure.set_dpi(DPI)
        # `savefig` would draw twice, first only to compute a layout that is settled already.
        with rc_context(STYLE):
            svg: Any = FigureCanvasSVG  # its methods are untyped
            png: Any = FigureCanvasAgg
            if form == "svg":
                svg(self.figure).print_svg(buffer, metadata={"Date": None, "Creator": "moepress"})
            else:
                png(self.figure).print_png(buffer, metadata={"Software": "moepress"})
        return buffer.getvalue()


def plain_numbers(axis: Axis, values: Floats) -> None:
    """Give a logarithmic axis enough ticks, labelled with plain numbers."""
    steps = (1.0,) if values.max() > FEW_DECADES * values.min() else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def settle(figure: Figure) -> None:
    """Compute limits and layout; later drawings keep them."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
    figure.set_layout_engine("none")


def panel_of(figure: Figure, ax: Axes, label: str, **content: Any) -> Panel:
    """The panel of the axes; `settle` must have run before."""
    box = ax.get_position()
    return Panel(label, box.x0, 1 - box.y1, box.width, box.height, **content)


def transformed(
    figure: Figure, ax: Axes, places: Sequence[tuple[float, float]]
) -> list[tuple[float, float]]:
    """Data coordinates as shares of the axes, from their top left corner."""
    settle(figure)
    shares = ax.transAxes.inverted().transform(ax.transData.transform(np.array(places)))
    return [(float(x), float(1 - y)) for x, y in shares]
