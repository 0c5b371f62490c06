"""Measure a running server: throughput, TTFT and TPOT, with and without skipping.

    python -m firstlab.serve.load url=http://127.0.0.1:8000 requests=64 concurrency=16
    python -m firstlab.serve.load skip_rates=0,0.15,0.25 max_tokens=64 out=load.json

Prompts are those of the four bundled tasks, mixed. FIRSTLAB_API_KEY is sent if it is set.
"""

from __future__ import annotations

import json
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import httpx

from firstlab.config.command_line import guarded, read_options
from firstlab.config.schema import option
from firstlab.serve.client import Answer, ask, connect


@dataclass
class LoadOptions:
    """Options of `python -m firstlab.serve.load`.

    Attributes:
        url: The server.
        requests: Of one round of one rate.
        concurrency: Requests at once.
        rounds: In which the rates take turns, after one that does not count.
        skip_rates: 0 runs every layer; null leaves it to the model.
        max_tokens: Of a response, which may end earlier; each limit is drawn from a quarter of it up to it.
        out: A file for the record: the figures of every round, and the machine that asked.
    """

    url: str = "http://127.0.0.1:8000"
    requests: int = option(64, least=1)
    concurrency: int = option(16, least=1)
    rounds: int = option(3, least=1)
    skip_rates: str = "0,null"
    max_tokens: int = option(64, least=1)
    out: str | None = None


def measure(options: LoadOptions) -> dict[str, Any]:
    """The record: for each rate the medians over its rounds, and every round; ValueError where the server fails.

    The speed-up is the median of tokens per second over those of the first rate in the same round.
    """
    # Only now torch.
    from firstlab.data.mini_qa import MiniQA
    from firstlab.data.mini_summarization import MiniSummarization
    from firstlab.data.mini_translation import MiniTranslation
    from firstlab.store.machine import provenance

    try:
        rates = [None if each == "null" else float(each) for each in options.skip_rates.split(",")]
    except ValueError as error:
        raise ValueError(f"skip_rates={options.skip_rates!r}: give numbers or null, with commas between") from error
    tasks = (MiniTranslation(), MiniTranslation("en-zh"), MiniSummarization(), MiniQA())
    prompts = [task.prompt(example) for task in tasks for example in task.test()]
    draw, most = random.Random(0), options.max_tokens
    drawn = [(draw.choice(prompts), draw.randint(-(-most // 4), most)) for _ in range(options.requests)]
    rounds: dict[float | None, list[dict[str, float]]] = {rate: [] for rate in rates}
    try:
        with connect(options.url) as client:
            [model] = client.get("/v1/models").raise_for_status().json()["data"]
            for number in range(1 + options.rounds):
                for rate in rates[:: (-1) ** number]:  # forwards and backwards, so that drift hits all alike
                    rounds[rate].append(_round(client, drawn, rate, options.concurrency))
    except httpx.HTTPError as error:
        raise ValueError(f"url={options.url} gave no answer ({error!r}): start the server, or correct it") from error
    variants, first = [], rounds[rates[0]]
    for rate, (_, *counted) in rounds.items():
        medians = {name: median(each[name] for each in counted) for name in counted[0]}
        faster = [mine["tokens_per_s"] / base["tokens_per_s"] for mine, base in zip(counted, first[1:], strict=True)]
        variants.append({"asked": rate, **medians, "speed_up": median(faster), "rounds": counted})
    return {"model": model, "settings": asdict(options), "variants": variants, **provenance()}


def _round(
    client: httpx.Client, drawn: list[tuple[str, int]], rate: float | None, concurrency: int
) -> dict[str, float]:
    """Every request once: throughput, the medians of the times, and what the decode steps of the server ran."""

    def answer(request: tuple[str, int]) -> Answer:
        prompt, limit = request
        return [*ask(client, prompt, max_tokens=limit, skip_rate=rate)][-1]

    begun, before = time.perf_counter(), _counted(client)
    with ThreadPoolExecutor(concurrency) as threads:
        answers = list(threads.map(answer, drawn))
    seconds = time.perf_counter() - begun
    steps, layers = (after - count for after, count in zip(_counted(client), before, strict=True))
    ttft = sorted(1000 * each.first_s for each in answers)
    decoded = [each for each in answers if each.usage["completion_tokens"] > 1]
    return {
        "skip_rate": fmean([each.usage["skip_rate"] for each in decoded] or [0.0]),
        "tokens_per_s": sum(each.usage["completion_tokens"] for each in answers) / seconds,
        "ttft_ms": median(ttft),
        "ttft_p95_ms": ttft[int(0.95 * (len(ttft) - 1))],
        "tpot_ms": median([1000 * each.per_token_s for each in decoded] or [0.0]),
        "union_layers": layers / max(1, steps),
    }


def _counted(client: httpx.Client) -> list[float]:
    """Decode steps, and the layers that they read, since the server was started."""
    lines = client.get("/metrics").text.splitlines()
    found = dict(line.rsplit(" ", 1) for line in lines if line[:1] != "#")
    return [float(found[f"firstlab_{name}_total"]) for name in ("decode_steps", "union_layers")]


@partial(guarded, resumes=False)
def main(arguments: list[str]) -> None:
    """Parse, measure, print."""
    options = read_options(LoadOptions, arguments, __doc__)
    record = measure(options)
    names = [name for name in record["variants"][0] if name != "rounds"]
    print("".join(f"{name:>14}" for name in names))
    for row in record["variants"]:
        print("".join(f"{'default' if row[name] is None else f'{row[name]:.3g}':>14}" for name in names))
    if options.out is not None:
        Path(options.out).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
