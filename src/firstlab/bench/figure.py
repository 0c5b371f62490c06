"""Draw TPOT against the skip rate, from benchmark.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def tpot_against_skip(record: dict[str, Any], paper: Mapping[int, float], file: Path) -> None:
    """TPOT ratio of each decoder and quantization against the skip rate, a panel per batch size and prompt length.

    Args:
        record: What `firstlab.benchmark.measure` gives.
        paper: Skip rate in percent to the paper's ratio.
        file: PNG to write.
    """
    cells = record["cells"]
    across = min(2, len(cells))
    down = -(-len(cells) // across)
    fig, axes = plt.subplots(down, across, figsize=(1 + 4.6 * across, 3.8 * down), squeeze=False, sharey=True)
    for axis, cell in zip(axes.flat, cells, strict=False):
        rows = sorted(cell["variants"], key=lambda row: row["skip_rate"])
        for quantization in dict.fromkeys(row["quantization"] for row in rows):
            alike = [row for row in rows if row["quantization"] == quantization]
            after, fill = (f", {quantization}", "none") if quantization else ("", "full")
            limits = [100 * row["skip_rate"] for row in alike], [row["limit_ratio"] for row in alike]
            line = ":" if quantization else "--"
            axis.plot(*limits, color="black", linestyle=line, label=f"limit: bytes read{after}")
            for decoder, colour, marker in (
                ("generate", "#0072b2", "s"),
                ("engine", "#d55e00", "o"),
                ("engine_eager", "#cc79a7", "v"),
            ):
                own = [row for row in alike if row["decoder"] == decoder]
                points = [100 * row["skip_rate"] for row in own], [row["tpot_ratio"] for row in own]
                if own:
                    style = {"color": colour, "marker": marker, "linestyle": ":" if quantization else "-"}
                    axis.plot(*points, **style, fillstyle=fill, label=decoder + after)
        axis.scatter(
            list(paper), list(paper.values()), color="#555555", marker="x", label="paper, Llama-3-8B", zorder=3
        )
        axis.set_title(f"batch {cell['batch_size']}, prompt of {cell['prompt_length']} tokens", fontsize=10, loc="left")
        axis.set_xlabel("layers skipped (%)")
        axis.set_ylabel("TPOT ÷ TPOT without skipping")
        axis.grid(alpha=0.3)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    for axis in list(axes.flat)[len(cells) :]:
        axis.set_visible(False)
    axes[0, 0].legend(fontsize=8, frameon=False)
    fig.suptitle(f"Decoding with skipped layers: {record['model']}, {record['device']}", fontsize=11)
    fig.tight_layout()
    fig.savefig(file, dpi=130)
    plt.close(fig)
