"""Serve a model over HTTP to programs that speak to OpenAI's API."""

from __future__ import annotations

import os
from dataclasses import dataclass

from firstlab.config.schema import option


@dataclass
class ServeOptions:
    """Options of `python -m firstlab.serve`.

    Attributes:
        run: Run directory, folder or hub id.
        variant: Of a run: base, base_lora, router or router_lora; the most trained one by default.
        name: What clients call the model; the last part of `run` by default.
        host, port: Where it listens. Others than this machine reach it with host=0.0.0.0: set FIRSTLAB_API_KEY then.
        device: cuda or cpu; null for CUDA where there is one.
        dtype: Of the weights (bfloat16, ...); null for that of the files. Runs keep their own.
        batch_size: Requests that decode together.
        waiting: Requests that may wait beyond these; more are refused with status 429.
        max_length: Tokens of prompt and response.
        max_new_tokens: Tokens of a response; also where a request names no limit.
        max_body: Bytes of a request.
        patience: How many prompts with layers in common may overtake one that waits for a place; 0: none. Null: four
            times batch_size.
        reserve: Prompts that are prefilled before they have a place, so that there is more to choose from.
        grace: Seconds that requests have to end after SIGTERM.
    """

    run: str = ""
    variant: str | None = None
    name: str = ""
    host: str = "127.0.0.1"
    port: int = option(8000, least=0, most=65535)
    device: str | None = option(None, choices="cuda, cpu")
    dtype: str | None = None
    batch_size: int = option(16, least=1)
    waiting: int = option(64, least=0)
    max_length: int = option(2048, least=2)
    max_new_tokens: int = option(512, least=1)
    max_body: int = option(256 * 1024, least=256)
    patience: int | None = option(None, least=0)
    reserve: int = option(0, least=0)
    grace: int = option(30, least=0)


def api_key() -> str | None:
    """FIRSTLAB_API_KEY, which a server wants and clients send; without the line end that a secret from a file has."""
    return os.environ.get("FIRSTLAB_API_KEY", "").strip() or None
