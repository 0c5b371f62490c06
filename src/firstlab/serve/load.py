"""Measure a running server: throughput, TTFT and TPOT, with and without skipping.

    python -m firstlab.serve.load url=http://127.0.0.1:8000 requests=64 concurrency=16
    python -m firstlab.serve.load skip_rates=0,0.15,0.25 max_tokens=64 out=load.json

Prompts are those of the four bundled tasks, mixed. FIRSTLAB_API_KEY is sent if it is set.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

from firstlab.config.command_line import guarded, parse_options
from firstlab.config.schema import check_options, option


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
        out: A file for the figures.
    """

    url: str = "http://127.0.0.1:8000"
    requests: int = option(64, least=1)
    concurrency: int = option(16, least=1)
    rounds: int = option(3, least=1)
    skip_rates: str = "0,null"
    max_tokens: int = option(64, least=1)
    out: str | None = None


def _rates(text: str) -> list[float | None]:
    try:
        return [None if each == "null" else float(each) for each in text.split(",")]
    except ValueError as error:
        raise ValueError(f"skip_rates={text!r}: give numbers or null, with commas between them") from error


async def _answer(client: Any, turns: asyncio.Semaphore, body: dict[str, Any]) -> dict[str, Any]:
    """The usage of a request, with its times."""
    async with turns:
        begun, first, usage = time.perf_counter(), 0.0, None
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise ValueError(json.loads(await response.aread())["error"]["message"])
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    first = first or time.perf_counter()
                    usage = json.loads(line.removeprefix("data: ")).get("usage") or usage
        if usage is None:
            raise ValueError(f"{client.base_url} ended a stream without its usage: its log says why")
        per_token = (time.perf_counter() - first) / max(1, usage["completion_tokens"] - 1)
        return {**usage, "ttft_ms": 1000 * (first - begun), "tpot_ms": 1000 * per_token}


async def _round(client: Any, bodies: list[dict[str, Any]], concurrency: int) -> dict[str, Any]:
    """Every request once."""
    begun, before = time.perf_counter(), await _counted(client)
    turns = asyncio.Semaphore(concurrency)
    answers = await asyncio.gather(*(_answer(client, turns, body) for body in bodies))
    steps, union = (now - then for now, then in zip(await _counted(client), before, strict=True))
    tokens = sum(answer["completion_tokens"] for answer in answers)
    seconds = time.perf_counter() - begun
    return {"answers": answers, "tokens_per_s": tokens / seconds, "union_layers": union / max(1, steps)}


async def _counted(client: Any) -> list[float]:
    """Decode steps, and the layers that they read, since the server was started."""
    lines = (await client.get("/metrics")).text.splitlines()
    found = dict(line.rsplit(" ", 1) for line in lines if line[:1] != "#")
    return [float(found[f"firstlab_{name}_total"]) for name in ("decode_steps", "union_layers")]


def _row(rate: float | None, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    answers = [answer for each in rounds for answer in each["answers"]]
    ttft = sorted(answer["ttft_ms"] for answer in answers)
    decoded = [answer for answer in answers if answer["completion_tokens"] > 1]
    return {
        "asked": rate,
        "skip_rate": fmean([answer["skip_rate"] for answer in decoded] or [0.0]),
        "tokens_per_s": median(each["tokens_per_s"] for each in rounds),
        "ttft_ms": median(ttft),
        "ttft_p95_ms": ttft[int(0.95 * (len(ttft) - 1))],
        "tpot_ms": median([answer["tpot_ms"] for answer in decoded] or [0.0]),
        "union_layers": fmean(each["union_layers"] for each in rounds),
    }


async def measure(options: LoadOptions) -> list[dict[str, Any]]:
    """A row of figures per rate; ValueError if the server cannot be reached or refuses a request."""
    import httpx

    from firstlab.data.mini_qa import MiniQA
    from firstlab.data.mini_summarization import MiniSummarization
    from firstlab.data.mini_translation import MiniTranslation

    tasks = (MiniTranslation(), MiniTranslation("en-zh"), MiniSummarization(), MiniQA())
    prompts = [task.prompt(example) for task in tasks for example in task.test()]
    draw, most = random.Random(0), options.max_tokens
    drawn = [(draw.choice(prompts), draw.randint(-(-most // 4), most)) for _ in range(options.requests)]
    told = {"stream": True, "stream_options": {"include_usage": True}}
    sent = [{"prompt": prompt, "max_tokens": limit, **told} for prompt, limit in drawn]
    headers = {"Authorization": f"Bearer {key}"} if (key := os.environ.get("FIRSTLAB_API_KEY")) else None
    rounds: dict[float | None, list[dict[str, Any]]] = {rate: [] for rate in _rates(options.skip_rates)}
    try:
        async with httpx.AsyncClient(base_url=options.url, headers=headers, timeout=600) as client:
            for _ in range(1 + options.rounds):
                for rate, done in rounds.items():
                    bodies = [{**body, "skip_rate": rate} for body in sent]
                    done.append(await _round(client, bodies, options.concurrency))
    except httpx.HTTPError as error:
        raise ValueError(f"url={options.url} gave no answer ({error!r}): start the server, or correct it") from error
    return [_row(rate, done[1:]) for rate, done in rounds.items()]


@partial(guarded, resumes=False)
def main(arguments: list[str]) -> None:
    """Parse, measure, print."""
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\n{LoadOptions.__doc__}")
        return
    options, words = parse_options(LoadOptions(), arguments)
    if words:
        raise ValueError(f"{words[0]!r} is not KEY=VALUE; see python -m firstlab.serve.load --help")
    check_options(options)
    rows = asyncio.run(measure(options))
    print("".join(f"{name:>14}" for name in rows[0]))
    for row in rows:
        print("".join(f"{'default' if value is None else f'{value:.3g}':>14}" for value in row.values()))
    if options.out is not None:
        Path(options.out).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
