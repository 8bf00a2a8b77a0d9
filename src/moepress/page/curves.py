"""Curves and bars: predicted loss against budget, cost of dropping experts, bytes by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from moepress.allocation.plan import BitAllocation
from moepress.byte_units import byte_unit
from moepress.original.sizes import PartBytes
from moepress.page.picture import STYLE, WIDTH, Picture, panel_of, plain_numbers, transformed

LOSS = "Predicted loss against budget"
DROPS = "Cost of dropping experts"
BYTES = "Bytes by part, before and after"


def loss_curve(plans: Sequence[BitAllocation], here: BitAllocation) -> Picture:
    """Predicted loss against the budget, with this model marked.

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
            plain_numbers(ax.yaxis, np.array(loss))
        ax.set_xlabel("average code bits of the routed experts")
        ax.set_ylabel("predicted loss")
        ax.grid(alpha=0.3)
        ax.legend(frameon=False)
        shares = transformed(figure, ax, [*zip(bits, loss, strict=True)])
        points = tuple(
            (x, y, _plan_lines(plan, here)) for (x, y), plan in zip(shares, plans, strict=True)
        )
        panel = panel_of(figure, ax, LOSS, points=points)
    about = (
        f"Predicted loss falls from {loss[0]:.3g} at {bits[0]:.2f} bits to {loss[-1]:.3g} at "
        f"{bits[-1]:.2f} bits; this model has {here.predicted_loss:.3g} at {here.average_bits:.2f}"
    )
    return Picture("loss", LOSS, about, figure, (panel,))


def drop_curve(ways: Mapping[str, Sequence[tuple[float, float]]]) -> Picture:
    """Cost of dropping experts against the share that is dropped.

    Args:
        ways: (share of the chosen experts, predicted cost) from share 0 up, by what is done with
            the kept routing weights.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        figure.suptitle(DROPS)
        ax = figure.subplots()
        for (name, points), color in zip(ways.items(), ("#21918c", "#440154"), strict=False):
            ax.plot(*zip(*points, strict=True), marker="o", markersize=3, color=color, label=name)
        ax.set_xlabel("share of the chosen experts that is dropped")
        ax.set_ylabel("squared error / energy")
        ax.grid(alpha=0.3)
        ax.legend(frameon=False)
        marks = [(x, y, name) for name, points in ways.items() for x, y in points]
        shares = transformed(figure, ax, [(x, y) for x, y, _ in marks])
        lines = tuple(
            (left, top, (f"{x:.0%} dropped, {name}", f"cost {y:.3g}"))
            for (left, top), (x, y, name) in zip(shares, marks, strict=True)
        )
        panel = panel_of(figure, ax, DROPS, points=lines)
    most = {name: points[-1] for name, points in ways.items()}
    about = "Predicted cost rises from 0 to " + ", ".join(
        f"{y:.3g} at {x:.0%} ({name})" for name, (x, y) in most.items()
    )
    return Picture("pruning", DROPS, about, figure, (panel,))


def part_bars(parts: Mapping[str, PartBytes]) -> Picture:
    """Bytes of every part of the model, before and after compression."""
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
        shares = transformed(figure, ax, [place for place, _ in points])
        texts = [lines for _, lines in points]
        drawn_points = tuple((x, y, text) for (x, y), text in zip(shares, texts, strict=True))
        panel = panel_of(figure, ax, BYTES, points=drawn_points)
    about = "; ".join(
        f"{part}: {size.original:,} bytes before, {size.stored:,} after"
        for part, size in parts.items()
    )
    return Picture("bytes", BYTES, about, figure, (panel,))


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
