"""What a picture is: a figure of matplotlib and its panels, and what all pictures have in common.

Panels say where on a picture each grid of experts or row of points lies, so that a page can tell
what is under the pointer.
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
FEW_DECADES = 1000  # most over least up to which a logarithmic axis says 1, 2, 5, 10, ...
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "moepress",  # equal pictures, equal bytes
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
}


@dataclass(frozen=True)
class Panel:
    """An area of a picture that answers to the pointer, as shares of the picture's size."""

    label: str
    left: float
    top: float
    width: float
    height: float
    # A grid of experts: rows and columns. Otherwise points, at shares of the panel from its top
    # left corner, each with the lines that tell about it.
    grid: tuple[int, int] | None = None
    points: tuple[tuple[float, float, tuple[str, ...]], ...] = ()


@dataclass(frozen=True)
class Picture:
    """A drawn figure."""

    name: str  # of its file
    title: str
    about: str  # what it shows, for those who cannot see it
    figure: Figure = field(repr=False)
    panels: tuple[Panel, ...]

    def image(self, form: str) -> bytes:
        """The picture as a file's bytes; equal pictures give equal bytes."""
        buffer = io.BytesIO()
        self.figure.set_dpi(DPI)
        # `savefig` would draw twice: once only to lay out anew what is settled.
        with rc_context(STYLE):
            svg: Any = FigureCanvasSVG  # its methods are untyped
            png: Any = FigureCanvasAgg
            if form == "svg":
                svg(self.figure).print_svg(buffer, metadata={"Date": None})
            else:
                png(self.figure).print_png(buffer, metadata={"Software": None})
        return buffer.getvalue()


def plain_numbers(axis: Axis, values: Floats) -> None:
    """A logarithmic axis with numbers as people write them, and enough of them."""
    steps = (1.0,) if values.max() > FEW_DECADES * values.min() else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def settle(figure: Figure) -> None:
    """Compute limits and layout once; every later drawing keeps them."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
    figure.set_layout_engine("none")


def panel_of(figure: Figure, ax: Axes, label: str, **content: Any) -> Panel:
    """The area of the axes; their place must be settled."""
    box = ax.get_position()
    return Panel(label, box.x0, 1 - box.y1, box.width, box.height, **content)


def transformed(
    figure: Figure, ax: Axes, places: Sequence[tuple[float, float]]
) -> list[tuple[float, float]]:
    """Data coordinates as shares of the axes, from their top left corner."""
    settle(figure)
    shares = ax.transAxes.inverted().transform(ax.transData.transform(np.array(places)))
    return [(float(x), float(1 - y)) for x, y in shares]
