"""Maps of layers x experts: the bit map of a model, and heat maps of measured values.

    rows: MoE layers, the first on top        columns: experts

Colours come from viridis and cividis, which differ in lightness as well as hue: they stay apart for
colour-blind readers and in black and white.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from moepress.allocation.plan import PROJECTIONS, BitAllocation
from moepress.format.codec import LEFT_OUT, width
from moepress.page.picture import (
    STYLE,
    WIDTH,
    Floats,
    Panel,
    Picture,
    panel_of,
    plain_numbers,
    settle,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELLED = 512  # largest number of cells whose values are written into them
LINE = 128  # characters that fit into the width of a picture
LOG_SPREAD = 20  # largest over smallest value above which the colour scale is logarithmic
NO_VALUE = "#d9d9d9"
# Lighter for fewer bits. A width has the same colour in every map, so that models can be compared.
BIT_COLOURS = {
    LEFT_OUT: "#ffffff", 1: "#fde725", 1.5: "#addc30", 2: "#5ec962", 2.5: "#28ae80", 3: "#21918c",
    3.5: "#2c728e", 4: "#3b528b", 8: "#440154",
}  # fmt: skip
BIT_MAP = "Code bits of every expert"


def bit_map(plan: BitAllocation) -> Picture:
    """Code bits of every expert: a map of gate and up, and one of down."""
    widths = [width(bits) for bits in np.unique(plan.bits).tolist()]
    colours = ListedColormap([BIT_COLOURS[bits] for bits in widths])
    norm = BoundaryNorm([bits - 0.25 for bits in widths] + [widths[-1] + 0.25], len(widths))
    maps = {
        f"{name}_proj": plan.bits[:, :, projection] for projection, name in enumerate(PROJECTIONS)
    }
    with rc_context(STYLE):
        figure, axes = _grids(maps, plan.layers, colours, norm, 1, extra=0.4)
        figure.suptitle(BIT_MAP)
        handles = [
            Patch(facecolor=colour, edgecolor=NO_VALUE, label=f"{_width(bits)} ({share:.1%})")
            for bits in widths
            for colour, share in [(BIT_COLOURS[bits], (plan.bits == bits).mean())]
        ]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=len(handles), frameon=False
        )
        panels = _grid_panels(figure, axes, maps)
    about = f"Code bits of {plan.bits.size} projections: " + ", ".join(
        str(handle.get_label()) for handle in handles
    )
    return Picture("bit-map", BIT_MAP, about, figure, panels)


def _width(bits: float) -> str:
    return "left out" if bits == LEFT_OUT else f"{bits} bit{'s' * (bits > 1)}"


def heat_map(
    name: str, title: str, maps: Mapping[str, Floats], layers: Sequence[int], unit: str
) -> Picture:
    """One or two maps of layers x experts with a common colour scale.

    Args:
        maps: [L, E] by title; NaN where there is no value.
        unit: label of the colour scale.
    """
    maps, times = _scaled(maps)
    values = np.concatenate([grid.ravel() for grid in maps.values()])
    norm, scale = _norm(values)
    colours = colormaps["cividis"].with_extremes(bad=NO_VALUE)
    with rc_context(STYLE):
        figure, axes = _grids(maps, layers, colours, norm, 4, extra=0.6)
        figure.suptitle(title)
        drawn = axes[0].collections[0] if axes[0].collections else axes[0].images[0]
        bar = figure.colorbar(drawn, ax=axes, location="bottom", aspect=60, pad=0.02)
        if isinstance(norm, LogNorm):
            plain_numbers(bar.ax.xaxis, values[values > 0])
        bar.set_label(f"{unit}{times}{scale}")
        if np.isnan(values).any():
            missing = Patch(facecolor=NO_VALUE, label="never chosen by the calibration text")
            figure.legend(handles=[missing], loc="outside lower center", frameon=False)
        panels = _grid_panels(figure, axes, maps)
    present = values[~np.isnan(values)]
    about = f"{title}: {unit}{times}"
    if present.size:
        about += f", from {present.min():.3g} to {present.max():.3g}"
    return Picture(name, title, about, figure, panels)


def _scaled(maps: Mapping[str, Floats]) -> tuple[Mapping[str, Floats], str]:
    """Small values as multiples of 10^-3, 10^-6, ...; and the label of that multiple."""
    most = max((float(np.nanmax(v)) for v in maps.values() if not np.isnan(v).all()), default=0.0)
    power = 3 * math.floor(math.log10(most) / 3) if 0 < most < 0.03 else 0
    if not power:
        return maps, ""
    digits = str(-power).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return {
        title: values * 10.0**-power for title, values in maps.items()
    }, f" \N{MULTIPLICATION SIGN} 10⁻{digits}"


def _norm(values: Floats) -> tuple[Normalize, str]:
    """The colour scale, logarithmic where values span much, and a label that then says so."""
    positive = values[values > 0]  # NaN compares as false
    if positive.size and positive.max() > LOG_SPREAD * positive.min():
        return LogNorm(positive.min(), positive.max(), clip=True), ", logarithmic"
    most = float(positive.max()) if positive.size else 1.0
    return Normalize(0, most), ""


def _grids(
    maps: Mapping[str, Floats],
    layers: Sequence[int],
    colours: Colormap,
    norm: Normalize,
    characters: int,
    extra: float = 0.0,
) -> tuple[Figure, list[Axes]]:
    """A figure with one grid of layers x experts per map, side by side where they fit.

    Args:
        characters: the most that a written value takes.
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
    """A number below 1000 with two digits or more, in at most four characters."""
    if value == int(value) or value >= 10:
        return f"{value:.0f}"
    if value >= 0.995:
        return f"{value:.1f}"
    return f"{value:.{2 if value >= 0.1 else 3}f}".removeprefix("0")


def _layer_name(layers: Sequence[int]) -> Any:
    return lambda row, _: str(layers[round(row)]) if 0 <= round(row) < len(layers) else ""


def _grid_panels(
    figure: Figure, axes: Sequence[Axes], maps: Mapping[str, Floats]
) -> tuple[Panel, ...]:
    settle(figure)
    return tuple(
        panel_of(figure, ax, title, grid=(values.shape[0], values.shape[1]))
        for ax, (title, values) in zip(axes, maps.items(), strict=True)
    )
