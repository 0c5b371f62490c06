"""Pictures drawn from result.json records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from firstlab.results import row_title


def skip_per_layer(rows: Sequence[dict[str, Any]], file: Path, title: str) -> None:
    """Bars of the share of prompts that skip each layer, one panel per row of `results.rows`.

    Args:
        rows: Variants with any skipping.
        file: PNG to write.
        title: Of the picture.
    """
    fig, axes = plt.subplots(len(rows), 1, figsize=(9, 1.2 + 1.5 * len(rows)), sharex=True, squeeze=False)
    for axis, row in zip(axes[:, 0], rows, strict=True):
        shares = 100 * np.array(row["skip"]["per_layer"])
        layers = np.arange(len(shares))
        axis.bar(layers, shares, color="#3b6ea5", width=0.8)
        axis.set_ylim(0, 100)
        axis.set_yticks([0, 50, 100])
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        metric = row["metrics"][row["metric"]]["value"]
        axis.set_title(
            f"{row_title(row)}: {100 * row['skip']['skip_rate']:.1f} % of layers skipped, "
            f"{row['metric']} {metric:.1f}, {row['skip']['unique_routes']} different routes",
            fontsize=9,
            loc="left",
        )
    step = max(1, len(layers) // 32)
    axes[-1, 0].set_xticks(layers[::step])
    axes[-1, 0].set_xlabel("decoder layer (0 = first)")
    fig.supylabel("prompts that skip the layer (%)", fontsize=10)
    fig.suptitle(title, fontsize=11)
    fig.tight_layout()
    fig.savefig(file, dpi=130)
    plt.close(fig)
