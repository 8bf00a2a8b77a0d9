"""Pictures of a plan and its scores, drawn by matplotlib: in the report, or files of their own.

A picture is a figure and its panels: where on it each grid of experts or row of points lies, so
that a page can tell what is under the pointer. Colours come from viridis and cividis, which differ
in lightness as well as hue: they survive colour blindness and a black-and-white printer.

    rows: MoE layers, the first on top        columns: experts
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from moepress.allocate import PROJECTIONS, BitAllocation
from moepress.parts import PartBytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

Format = Literal["svg", "png"]
Floats = npt.NDArray[np.float64]

WIDTH = 10.0  # inches
DPI = 200  # of a PNG
LABELLED = 512  # experts of a map up to which each cell has its value written in it
LINE = 128  # characters that fit side by side into a picture
LOG_SPREAD = 20  # most over least from which colours are spread by the logarithm
FEW_DECADES = 1000  # most over least up to which a logarithmic axis says 1, 2, 5, 10, ...
NEVER = "#d9d9d9"  # an expert without a value
# Fewer bits, lighter; one colour for each width, so that maps of different models can be compared.
BIT_COLOURS = {1: "#fde725", 2: "#5ec962", 3: "#21918c", 4: "#3b528b", 8: "#440154"}
BIT_MAP = "Code bits of every expert"
LOSS = "Predicted loss against budget"
DROPS = "What skipping experts costs"
BYTES = "Bytes by part, before and after"
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


def bit_map(plan: BitAllocation) -> Picture:
    """Layers x experts, coloured by code bits: gate and up, and down."""
    widths = sorted({*np.unique(plan.bits).tolist()})
    colours = ListedColormap([BIT_COLOURS[bits] for bits in widths])
    norm = BoundaryNorm([bits - 0.5 for bits in widths] + [widths[-1] + 0.5], len(widths))
    maps = {
        f"{name}_proj": plan.bits[:, :, column].astype(np.float64)
        for column, name in enumerate(PROJECTIONS)
    }
    with rc_context(STYLE):
        figure, axes = _grids(maps, plan.layers, colours, norm, 1, extra=0.4)
        figure.suptitle(BIT_MAP)
        handles = [
            Patch(facecolor=BIT_COLOURS[bits], label=f"{bits} bit{'s' * (bits > 1)} ({share:.1%})")
            for bits in widths
            for share in [(plan.bits == bits).mean()]
        ]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=len(handles), frameon=False
        )
        panels = _grid_panels(figure, axes, maps)
    about = f"Code bits of {plan.bits.size} projections: " + ", ".join(
        str(handle.get_label()) for handle in handles
    )
    return Picture("bit-map", BIT_MAP, about, figure, panels)


def heat_map(
    name: str, title: str, maps: Mapping[str, Floats], layers: Sequence[int], unit: str
) -> Picture:
    """One or two maps of layers x experts that share a scale of colours.

    Args:
        maps: [L, E] by title; NaN where there is no value.
        unit: what the colours count.
    """
    maps, times = _handy(maps)
    values = np.concatenate([grid.ravel() for grid in maps.values()])
    norm, scale = _norm(values)
    colours = colormaps["cividis"].with_extremes(bad=NEVER)
    with rc_context(STYLE):
        figure, axes = _grids(maps, layers, colours, norm, 4, extra=0.6)
        figure.suptitle(title)
        drawn = axes[0].collections[0] if axes[0].collections else axes[0].images[0]
        bar = figure.colorbar(drawn, ax=axes, location="bottom", aspect=60, pad=0.02)
        if isinstance(norm, LogNorm):
            _plain_numbers(bar.ax.xaxis, values[values > 0])
        bar.set_label(f"{unit}{times}{scale}")
        if np.isnan(values).any():
            missing = Patch(facecolor=NEVER, label="never chosen by the calibration text")
            figure.legend(handles=[missing], loc="outside lower center", frameon=False)
        panels = _grid_panels(figure, axes, maps)
    known = values[~np.isnan(values)]
    about = f"{title}: {unit}{times}"
    if known.size:
        about += f", from {known.min():.3g} to {known.max():.3g}"
    return Picture(name, title, about, figure, panels)


def loss_curve(plans: Sequence[BitAllocation], here: BitAllocation) -> Picture:
    """Predicted loss against the budget, and where this model stands on it.

    Args:
        plans: in rising order of bits.
    """
    bits = [plan.average_bits for plan in plans]
    loss = [plan.predicted_loss for plan in plans]
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        figure.suptitle(LOSS)
        ax = figure.subplots()
        ax.plot(bits, loss, marker="o", markersize=3, color="#21918c")
        ax.plot(
            [here.average_bits],
            [here.predicted_loss],
            marker="*",
            markersize=13,
            linestyle="none",
            color="#440154",
            label="this model",
        )
        if min(loss) > 0:
            ax.set_yscale("log")
            _plain_numbers(ax.yaxis, np.array(loss))
        ax.set_xlabel("average code bits of the routed experts")
        ax.set_ylabel("predicted loss")
        ax.grid(alpha=0.3)
        ax.legend(frameon=False)
        shares = _transformed(figure, ax, [*zip(bits, loss, strict=True)])
        points = tuple(
            (x, y, _plan_lines(plan, here)) for (x, y), plan in zip(shares, plans, strict=True)
        )
        panel = _panel(figure, ax, LOSS, points=points)
    about = (
        f"Predicted loss falls from {loss[0]:.3g} at {bits[0]:.2f} bits to {loss[-1]:.3g} at "
        f"{bits[-1]:.2f} bits; this model has {here.predicted_loss:.3g} at {here.average_bits:.2f}"
    )
    return Picture("loss", LOSS, about, figure, (panel,))


def drop_curve(ways: Mapping[str, Sequence[tuple[float, float]]]) -> Picture:
    """What skipping experts costs against how many are skipped.

    Args:
        ways: (share of the chosen experts, predicted cost) from share 0 up, by what is done with
            the weights of those that stay.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        figure.suptitle(DROPS)
        ax = figure.subplots()
        for (name, points), color in zip(ways.items(), ("#21918c", "#440154"), strict=False):
            ax.plot(*zip(*points, strict=True), marker="o", markersize=3, color=color, label=name)
        ax.set_xlabel("share of the chosen experts that is skipped")
        ax.set_ylabel("squared error / energy")
        ax.grid(alpha=0.3)
        ax.legend(frameon=False)
        told = [(x, y, name) for name, points in ways.items() for x, y in points]
        shares = _transformed(figure, ax, [(x, y) for x, y, _ in told])
        lines = tuple(
            (left, top, (f"{x:.0%} skipped, {name}", f"cost {y:.3g}"))
            for (left, top), (x, y, name) in zip(shares, told, strict=True)
        )
        panel = _panel(figure, ax, DROPS, points=lines)
    most = {name: points[-1] for name, points in ways.items()}
    about = "Predicted cost rises from 0 to " + ", ".join(
        f"{y:.3g} at {x:.0%} ({name})" for name, (x, y) in most.items()
    )
    return Picture("pruning", DROPS, about, figure, (panel,))


def part_bars(parts: Mapping[str, PartBytes]) -> Picture:
    """Bytes of every part of the model, before and after."""
    unit, name = byte_unit(max(size.original for size in parts.values()))
    names = list(parts)
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.8 + 0.5 * len(parts)), layout="constrained")
        figure.suptitle(BYTES)
        ax = figure.subplots()
        bars = (("original", -0.2, "#bdbdbd"), ("stored", 0.2, "#3b528b"))
        points = []
        for key, offset, colour in bars:
            values = [getattr(size, key) / unit for size in parts.values()]
            drawn = ax.barh(np.arange(len(parts)) + offset, values, 0.38, color=colour, label=key)
            ax.bar_label(drawn, [f"{value:.3g}" for value in values], padding=3)
            points += [
                ((value / 2, row + offset), (part, f"{key}: {getattr(parts[part], key):,} bytes"))
                for row, (part, value) in enumerate(zip(names, values, strict=True))
            ]
        ax.set_yticks(range(len(parts)), names)
        ax.invert_yaxis()
        ax.margins(x=0.08)
        ax.set_xlabel(name)
        ax.legend(frameon=False)
        shares = _transformed(figure, ax, [place for place, _ in points])
        texts = [lines for _, lines in points]
        drawn_points = tuple((x, y, text) for (x, y), text in zip(shares, texts, strict=True))
        panel = _panel(figure, ax, BYTES, points=drawn_points)
    about = "; ".join(
        f"{part}: {size.original:,} bytes before, {size.stored:,} after"
        for part, size in parts.items()
    )
    return Picture("bytes", BYTES, about, figure, (panel,))


def byte_unit(most: float) -> tuple[float, str]:
    """A unit in which `most` bytes is a handy number, and its name."""
    power = min(4, max(0, int(math.log10(max(most, 1)) // 3)))
    return 1000.0**power, ("bytes", "kB", "MB", "GB", "TB")[power]


def _plan_lines(plan: BitAllocation, here: BitAllocation) -> tuple[str, ...]:
    unit, name = byte_unit(plan.folder_bytes)
    lines = [
        f"{plan.average_bits:.2f} code bits, {plan.folder_bytes / unit:.4g} {name}",
        f"predicted loss {plan.predicted_loss:.3g}",
    ]
    if here.predicted_loss > 0:
        change = plan.predicted_loss / here.predicted_loss - 1
        lines.append(f"{change:+.1%} against this model")
    return tuple(lines)


def _handy(maps: Mapping[str, Floats]) -> tuple[Mapping[str, Floats], str]:
    """Small values as multiples of a thousandth, a millionth and so on, and which."""
    most = max((float(np.nanmax(v)) for v in maps.values() if not np.isnan(v).all()), default=0.0)
    power = 3 * math.floor(math.log10(most) / 3) if 0 < most < 0.03 else 0
    if not power:
        return maps, ""
    digits = str(-power).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return {
        title: values * 10.0**-power for title, values in maps.items()
    }, f" \N{MULTIPLICATION SIGN} 10⁻{digits}"


def _norm(values: Floats) -> tuple[Normalize, str]:
    """How values become colours: by their logarithm where they span much, and then says so."""
    positive = values[values > 0]  # NaN compares as false
    if positive.size and positive.max() > LOG_SPREAD * positive.min():
        return LogNorm(positive.min(), positive.max(), clip=True), ", logarithmic"
    most = float(positive.max()) if positive.size else 1.0
    return Normalize(0, most), ""


def _plain_numbers(axis: Axis, values: Floats) -> None:
    """A logarithmic axis with numbers as people write them, and enough of them."""
    steps = (1.0,) if values.max() > FEW_DECADES * values.min() else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _grids(
    maps: Mapping[str, Floats],
    layers: Sequence[int],
    colours: Colormap,
    norm: Normalize,
    characters: int,
    extra: float = 0.0,
) -> tuple[Figure, list[Axes]]:
    """A figure with one grid of layers x experts for each map, beside or above each other.

    Args:
        characters: that a value takes at most, written out.
    """
    rows, experts = next(iter(maps.values())).shape
    labelled = rows * experts <= LABELLED and experts * characters <= LINE
    columns = len(maps) if 2 * len(maps) * experts * characters <= LINE else 1
    lines = -(-len(maps) // columns)
    height = lines * (0.7 + min(4.5, max(1.0, rows * (0.3 if labelled else 0.12))))
    figure = Figure(figsize=(WIDTH, height + extra), layout="constrained")
    axes = [*figure.subplots(lines, columns, squeeze=False).flat]
    for ax, (title, values) in zip(axes, maps.items(), strict=True):
        if len(maps) > 1:
            ax.set_title(title)
        if labelled:
            edges = np.arange(experts + 1) - 0.5, np.arange(rows + 1) - 0.5
            ax.pcolormesh(
                *edges,
                np.ma.masked_invalid(values),
                cmap=colours,
                norm=norm,
                edgecolors="white",
                linewidth=1.5,
            )
            ax.invert_yaxis()
            for (row, expert), value in np.ndenumerate(values):
                if not math.isnan(value):
                    dark = sum(np.multiply(colours(norm(value))[:3], (0.30, 0.59, 0.11))) < 0.5
                    ax.text(
                        expert,
                        row,
                        _short(value),
                        ha="center",
                        va="center",
                        color="white" if dark else "black",
                        fontsize=7 if experts > 16 else 8,
                    )
        else:
            ax.imshow(
                np.ma.masked_invalid(values),
                cmap=colours,
                norm=norm,
                aspect="auto",
                interpolation="none",
            )
        ax.set_xlabel("expert")
        ax.set_ylabel("layer")
        ax.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
        ax.yaxis.set_major_formatter(FuncFormatter(_layer_name(layers)))
    return figure, axes


def _short(value: float) -> str:
    """Two digits or more of a number below 1000, in at most four characters."""
    if value == int(value) or value >= 10:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}".removeprefix("0")[:4]


def _layer_name(layers: Sequence[int]) -> Any:
    return lambda place, _: str(layers[round(place)]) if 0 <= round(place) < len(layers) else ""


def _grid_panels(
    figure: Figure, axes: Sequence[Axes], maps: Mapping[str, Floats]
) -> tuple[Panel, ...]:
    _settle(figure)
    return tuple(
        _panel(figure, ax, title, grid=(values.shape[0], values.shape[1]))
        for ax, (title, values) in zip(axes, maps.items(), strict=True)
    )


def _settle(figure: Figure) -> None:
    """Compute limits and layout once; every later drawing keeps them."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
    figure.set_layout_engine("none")


def _panel(figure: Figure, ax: Axes, label: str, **content: Any) -> Panel:
    """The area of the axes; their place must be settled."""
    box = ax.get_position()
    return Panel(label, box.x0, 1 - box.y1, box.width, box.height, **content)


def _transformed(
    figure: Figure, ax: Axes, places: Sequence[tuple[float, float]]
) -> list[tuple[float, float]]:
    """Data coordinates as shares of the axes, from their top left corner."""
    _settle(figure)
    shares = ax.transAxes.inverted().transform(ax.transData.transform(np.array(places)))
    return [(float(x), float(1 - y)) for x, y in shares]
