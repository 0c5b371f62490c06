"""Pictures as inline SVG that follow the page's colours: light or dark."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from firstlab.tables.table import Column

#: Drawn with this, shown in the colour of the surrounding text.
_INK = "#010203"
#: Colours that differ in lightness too, for readers who do not tell hues apart (Okabe and Ito).
COLOURS = {
    "first": "#d55e00", "first_soft": "#e69f00", "sleb": "#0072b2", "static_first": "#cc79a7", "oracle": "#009e73",
    "random_skip": "#8c8c8c", "unified_skip": "#56b4e9", "skip_decode": "#a67c52", "shortgpt": "#7b6fd0",
    "early_exit": "#b8a000", "none": _INK,
}  # fmt: skip
MARKERS = {"first": "o", "first_soft": "s", "sleb": "^", "static_first": "D", "oracle": "*", "unified_skip": "v"}

_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "firstlab", "font.sans-serif": ["DejaVu Sans"], "font.size": 9,
    "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": _INK, "grid.alpha": 0.12,
    "axes.axisbelow": True, "legend.frameon": False, 
    "axes.linewidth": 0.6, "figure.dpi": 96, "figure.constrained_layout.use": True,
}  # fmt: skip


def layer_bars(panels: Sequence[tuple[str, Sequence[float]]]) -> str:
    """One panel of bars per run: (title, percent of prompts that skip each layer)."""
    with plt.rc_context(_STYLE):
        fig, axes = plt.subplots(len(panels), 1, figsize=(8.4, 0.5 + 1.35 * len(panels)), squeeze=False)
        for axis, (title, shares) in zip(axes[:, 0], panels, strict=True):
            colour = COLOURS["random_skip"] if title.startswith("Paper") else COLOURS["first"]
            axis.bar(range(len(shares)), shares, color=colour, width=0.75)
            axis.set(ylim=(0, 104), yticks=[0, 50, 100], xlim=(-0.7, len(shares) - 0.3), xticks=range(len(shares)))
            axis.grid(axis="x", visible=False)
            axis.set_title(title, fontsize=9, loc="left")
        axes[-1, 0].set_xlabel("decoder layer (0 = first)")
        fig.supylabel("prompts that skip the layer (%)", fontsize=9)
        return _svg(fig, "Share of prompts that skip each layer")


def heatmap(columns: Sequence[Column], data: Sequence[Sequence[float]]) -> str:
    """Layers across, runs down: `data` holds each run's shares in percent and their mean; `columns[0]` is no run."""
    names = [f"{column.group}, {column.name}" for column in columns[1:]]
    width = max(len(values) for values in data) - 1
    grid = [[*values[:-1], *[float("nan")] * (width - len(values) + 1)] for values in data]
    with plt.rc_context({**_STYLE, "axes.grid": False}):
        fig, axis = plt.subplots(figsize=(8.4, 0.7 + 0.27 * len(data)))
        image = axis.imshow(grid, cmap="Oranges", vmin=0, vmax=100, aspect="auto", interpolation="nearest")
        axis.set(xticks=range(0, width, 2 if width > 20 else 1), yticks=range(len(names)))
        axis.set_yticklabels(names)
        axis.set_xlabel("decoder layer")
        fig.colorbar(image, ax=axis, label="skipped (%)", pad=0.01, fraction=0.03)
        return _svg(fig, "Share of prompts that skip each layer, by run")


#: skip rate in percent (or what else lies on the x axis), value, low, high
Point = tuple[float, float, float | None, float | None]
#: method, title, points by rate
Curve = tuple[str, str, list[Point]]


def quality_against_skip(panels: Sequence[tuple[str, str, Sequence[Curve]]]) -> str:
    """Per panel (title, metric, curves): quality against the measured skip rate, with intervals."""
    with plt.rc_context(_STYLE):
        across = min(2, len(panels))
        down = -(-len(panels) // across)
        fig, axes = plt.subplots(down, across, figsize=(4.6 * across, 3.2 * down), squeeze=False, sharey="row")
        labels: dict[str, Any] = {}
        for axis, (title, metric, curves) in zip(axes.flat, panels, strict=False):
            for method, name, points in curves:
                bars = [(0.0 if low is None else max(0.0, y - low), 0.0 if high is None else max(0.0, high - y))
                        for _, y, low, high in points]  # fmt: skip
                strong = method in ("first", "none")
                line = axis.errorbar(
                    [p[0] for p in points], [p[1] for p in points], yerr=list(zip(*bars, strict=True)),
                    linewidth=1.8 if strong else 1, elinewidth=0.7, color=COLOURS.get(method, "#777777"),
                    marker=MARKERS.get(method, "o"), markersize=5 if strong else 4, zorder=3 if strong else 2,
                )  # fmt: skip
                labels.setdefault(name, line)
            axis.set(title=title, xlabel="measured skip rate (%)", ylabel=metric)
            axis.set_xlim(left=-1.5)
        for axis in list(axes.flat)[len(panels) :]:
            axis.set_visible(False)
        fig.legend(list(labels.values()), list(labels), loc="outside lower center", ncols=4, fontsize=8.5)
        return _svg(fig, "Quality against measured skip rate")


def lines(panels: Sequence[tuple[str, str, str, Sequence[Curve]]]) -> str:
    """Per panel (title, x label, y label, curves): plain lines."""
    with plt.rc_context(_STYLE):
        fig, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 2.9), squeeze=False)
        labels: dict[str, Any] = {}
        for axis, (title, x_name, y_name, curves) in zip(axes.flat, panels, strict=True):
            for method, name, points in curves:
                style = {"color": COLOURS.get(method, "#777777"), "marker": "o", "markersize": 4}
                labels.setdefault(name, axis.plot([p[0] for p in points], [p[1] for p in points], **style)[0])
            axis.set(title=title, xlabel=x_name, ylabel=y_name)
        fig.legend(list(labels.values()), list(labels), loc="outside lower center", ncols=3, fontsize=8.5)
        return _svg(fig, panels[0][0])


def standalone(svg: str) -> str:
    """A picture of the page as a file of its own: dark ink on white."""
    return svg.replace("currentColor", "#222222").replace('style="', 'style="background:white;', 1) + "\n"


def _svg(fig: Figure, label: str) -> str:
    buffer = io.StringIO()
    fig.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(fig)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    # Hundredths of a point and the ids that something points to are enough.
    text = re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", re.sub(r"\s+", " ", text))
    used = set(re.findall(r'#([^"()]+)[")]', text))
    text = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", text)
    # Several pictures share one page: their ids must not meet.
    salt = f"{label[:1].lower()}{zlib.crc32(text.encode()):08x}"
    text = re.sub(r'( id="|url\(#|href="#)', rf"\1{salt}-", text)
    text = re.sub(r'(<svg[^>]*?) height="[^"]+"', r"\1", text, count=1)
    start = rf'<svg role="img" aria-label="{label}" style="width:\2pt" \1'
    return re.sub(r'<svg ([^>]*?)width="([\d.]+)pt"', start, text, count=1)
