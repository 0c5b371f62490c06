"""Measure, print and write: the tables, files and picture of both measurements."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from firstlab.bench import decoding, training
from firstlab.bench.config import BenchmarkConfig, SpeedConfig, TrainingSpeedConfig
from firstlab.store import paper
from firstlab.store.files import check_writable, write_atomically

LOOKS = {"generate": ("#0072b2", "s"), "engine": ("#d55e00", "o"), "engine_eager": ("#cc79a7", "v")}
TRAINERS = {
    "plain": "transformers Trainer + PEFT LoRA",
    "phase_1": "firstlab phase 1 (routers)",
    "phase_2": "firstlab phase 2 (LoRA)",
}


def run(config: SpeedConfig) -> None:
    """Measure what the configuration is about; print it and write it to its folder."""
    check_writable(Path(config.out), "out")
    if isinstance(config, TrainingSpeedConfig):
        file, record = Path(config.out) / "training_speed.json", training.measure(config)
        print_training(record)
    else:
        assert isinstance(config, BenchmarkConfig)
        file, record = Path(config.out) / "benchmark.json", decoding.measure(config)
        print_decoding(record)
        picture = file.with_suffix(".png")
        tpot_against_skip(record, paper.read()["tpot"]["5"]["tasks"]["wmt_ende"], picture)
        print(f"picture: {picture}")
    write_atomically(file, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    print(f"record:  {file}")


def print_table(title: str, rows: Sequence[dict[str, str | None]]) -> None:
    """The first column holds the names; columns without any value are left out."""
    view = Table(title=title, title_justify="left")
    names = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    for place, name in enumerate(names):
        view.add_column(name, no_wrap=place == 0, justify="left" if place == 0 else "right")
    for row in rows:
        view.add_row(*(row[name] or "-" for name in names))
    Console(width=None if sys.stdout.isatty() else 150).print(view)


def print_decoding(record: dict[str, Any]) -> None:
    """One table per batch size and prompt length, then a line for each mixed batch and queue."""
    for cell in record["cells"]:
        title = f"{record['model']}, batch {cell['batch_size']}, prompt of {cell['prompt_length']} tokens"
        print_table(title, [_decoding_row(row) for row in cell["variants"]])
        least = {row["quantization"]: row["limit_tpot_s"] for row in cell["variants"] if row["skip_rate"] == 0}
        limits = [f"{1000 * seconds:.2f} ms" + (f" ({name})" if name else "") for name, seconds in least.items()]
        print(
            f"routers: {1000 * cell['router_s']:.2f} ms, {100 * cell['router_share_of_prefill']:.2f} % of prefill; "
            f"TPOT of the bytes read without skipping: {', '.join(limits)} "
            f"(copies run at {record['copy_bandwidth_bytes_per_s'] / 1e9:.1f} GB/s)"
        )
    for row in record["mixed_routes"]:
        routes = ", ".join(filter(None, (f"{row['routes']} routes", row["quantization"])))
        print(
            f"mixed routes: {100 * row['throughput_ratio']:.0f} % of the throughput of one shared route "
            f"({routes}, batch {row['batch_size']}, prompt of {row['prompt_length']} tokens, "
            f"{100 * row['skip_rate']:.1f} % skipped, {row['tokens_per_s']:.0f} tokens/s; "
            f"by the bytes read {100 * row['limit_ratio']:.0f} %)"
        )
    for row in record["queues"]:
        batch = ", ".join(filter(None, (f"batch {row['batch_size']}", row["quantization"])))
        print(
            f"queue of {row['prompts']} prompts of up to {row['prompt_length']} tokens, {batch}, "
            f"{100 * row['skip_rate']:.1f} % skipped: {row['tokens_per_s']:.0f} tokens/s, "
            f"{row['speedup_over_generate']:.2f} times those of generate, batch by batch "
            f"({row['tokens_per_s_generate']:.0f})"
        )
    if record["lossless"]:
        title = f"{record['model']}, dense greedy text, {record['lossless'][0]['prompts']} prompts one by one"
        print_table(title, [_lossless_row(row) for row in record["lossless"]])
    share = min(row["cpu_share"] for cell in record["cells"] for row in cell["variants"])
    if share < record["settings"]["least_cpu_share"]:
        print(
            f"warning: other processes had the CPU for up to {100 * (1 - share):.0f} % of a run: times are too long, "
            "and medians mislead; measure on a quiet machine",
            file=sys.stderr,
        )


def _decoding_row(row: dict[str, Any]) -> dict[str, str | None]:
    def number(name: str, form: str, factor: float = 1) -> str | None:
        return None if row[name] is None else f"{factor * row[name]:{form}}"

    saved = row["kv_bytes_saved"]
    return {
        "": " ".join(filter(None, (row["decoder"], row["quantization"]))),
        "skipped": f"{100 * row['skip_rate']:.1f} %",
        "TTFT ms": number("ttft_s", ".1f", 1000),
        "TPOT ms": number("tpot_mean_s", ".2f", 1000),
        "median": number("tpot_s", ".2f", 1000),
        "p95": number("tpot_p95_s", ".2f", 1000),
        "tokens/s": number("tokens_per_s", ".0f"),
        "speed-up": number("speedup_over_transformers", ".2f"),
        "TPOT ratio": f"{row['tpot_ratio']:.2f}x",
        "limit": f"{row['limit_ratio']:.2f}x",
        "× plain weights": number("speedup_over_unquantized", ".2f") if row["quantization"] else None,
        "KV MiB": number("kv_bytes", ".2f", 2**-20),
        "saved": f"{100 * saved / (row['kv_bytes'] + saved):.0f} %",
        "peak MiB": number("peak_memory_bytes", ".0f", 2**-20),
        "CPU": f"{100 * row['cpu_share']:.0f} %",
        "J/token": number("joules_per_token", ".3g"),
    }


def _lossless_row(row: dict[str, Any]) -> dict[str, str | None]:
    rate, drafted = row["skip_rate_asked"], row.get("drafted")
    return {
        "": row["decoder"],
        "drafts skip": None if rate is None else f"{100 * rate:g} %",
        "ms per token": f"{1000 * row['seconds_per_token']:.2f}",
        "speed-up": f"{row['speedup_over_transformers']:.2f}",
        "same text": f"{100 * row['same_text']:.0f} %",
        "accepted": None if not drafted else f"{row['accepted']} of {drafted}",
        "said to be slower": None if drafted is None else f"{row['warned']} of {row['prompts']}",
    }


def print_training(record: dict[str, Any]) -> None:
    """One row per trainer."""
    given = record["settings"]
    title = (
        f"{record['model']}, batch {given['batch_size']}, prompts of {given['prompt_length']} and responses of "
        f"{given['response_length']} tokens, {given['model']['dtype']}, {record['device']}"
    )
    rows = []
    for row in record["variants"]:
        peak = row["peak_memory_bytes"]
        shown = {"": TRAINERS[row["variant"]], "trained parameters": f"{row['trainable_parameters']:,}"}
        shown |= {"step ms": f"{1000 * row['step_s']:.1f}", "tokens/s": f"{row['tokens_per_s']:.0f}"}
        shown |= {"speed-up": f"{row['speedup_over_plain']:.2f}"}
        rows.append({**shown, "peak MiB": None if peak is None else f"{peak / 2**20:.0f}"})
    print_table(title, rows)
    if all(row["peak MiB"] is None for row in rows):
        print("peak memory is measured on CUDA devices only")


def tpot_against_skip(record: dict[str, Any], paper: Mapping[int, float], file: Path) -> None:
    """Write a PNG: TPOT ratios, a panel per batch size and prompt length, and the `paper`'s by skip rate in percent."""
    cells = record["cells"]
    across = min(2, len(cells))
    down = -(-len(cells) // across)
    fig, axes = plt.subplots(down, across, figsize=(1 + 4.6 * across, 3.8 * down), squeeze=False, sharey=True)
    for axis, cell in zip(axes.flat, cells, strict=False):
        rows = sorted(cell["variants"], key=lambda row: row["skip_rate"])
        for quantization in dict.fromkeys(row["quantization"] for row in rows):
            alike = [row for row in rows if row["quantization"] == quantization]
            after, fill, line = (f", {quantization}", "none", ":") if quantization else ("", "full", "-")
            limits = [100 * row["skip_rate"] for row in alike], [row["limit_ratio"] for row in alike]
            limit = ":" if quantization else "--"
            axis.plot(*limits, color="black", linestyle=limit, label=f"limit: bytes read{after}")
            for decoder, (colour, marker) in LOOKS.items():
                own = [row for row in alike if row["decoder"] == decoder]
                points = [100 * row["skip_rate"] for row in own], [row["tpot_ratio"] for row in own]
                if own:
                    style = {"color": colour, "marker": marker, "linestyle": line, "fillstyle": fill}
                    axis.plot(*points, **style, label=decoder + after)
        axis.scatter(list(paper), list(paper.values()), c="#555555", marker="x", label="paper, Llama-3-8B", zorder=3)
        axis.set_title(f"batch {cell['batch_size']}, prompt of {cell['prompt_length']} tokens", fontsize=10, loc="left")
        axis.set_xlabel("layers skipped (%)")
        axis.set_ylabel("TPOT ÷ TPOT without skipping")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in list(axes.flat)[len(cells) :]:
        axis.set_visible(False)
    axes[0, 0].legend(fontsize=8, frameon=False)
    fig.suptitle(f"Decoding with skipped layers: {record['model']}, {record['device']}", fontsize=11)
    fig.tight_layout()
    fig.savefig(file, dpi=130)
    plt.close(fig)
