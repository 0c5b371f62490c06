"""Serve a model to programs that speak to OpenAI's API.

    python -m firstlab.serve run=DIR                # a run directory of firstlab.train
    python -m firstlab.serve run=me/first-ende      # a folder or hub id of firstlab, or any causal LM
    FIRSTLAB_API_KEY=secret python -m firstlab.serve run=DIR host=0.0.0.0

Where a run's base model has moved, model.path=FOLDER says where it is.
"""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from firstlab.config.command_line import guarded, parse_options
from firstlab.config.schema import check_options, option

if TYPE_CHECKING:
    from firstlab.serve.app import Server


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


@partial(guarded, resumes=False)
def main(arguments: list[str]) -> None:
    """Parse, load, serve until SIGTERM or Ctrl-C."""
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\n{ServeOptions.__doc__}")
        return
    base = "model.path="
    moved = dict(each.split("=", 1) for each in arguments if each.startswith(base))
    options, words = parse_options(ServeOptions(), [each for each in arguments if not each.startswith(base)])
    if words:
        raise ValueError(f"{words[0]!r} is not KEY=VALUE; see python -m firstlab.serve --help")
    if not options.run:
        raise ValueError("run=DIR is missing; try: python -m firstlab.serve run=DIR")
    check_options(options)
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ValueError(f"serving needs {error.name}: pip install 'firstlab[serve]'") from error
    key = os.environ.get("FIRSTLAB_API_KEY") or None
    if key is None and options.host not in ("127.0.0.1", "::1", "localhost"):
        print(f"warning: everybody who reaches {options.host} may use this: set FIRSTLAB_API_KEY", file=sys.stderr)
    with _bound(options.host, options.port) as sock:
        server = build(options, moved, key)
        config = uvicorn.Config(
            server.app(), log_level="warning", access_log=False, timeout_graceful_shutdown=options.grace
        )
        where = f"http://{options.host}:{sock.getsockname()[1]}"
        print(f"{server.name} at {where}/v1; metrics at {where}/metrics; SIGTERM or Ctrl-C ends it", flush=True)
        try:
            uvicorn.Server(config).run([sock])
        except KeyboardInterrupt:  # uvicorn raises again what it has ended on
            print("stopped", flush=True)


def _bound(host: str, port: int) -> socket.socket:
    """A socket at that place, on which nothing listens yet."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise ValueError(f"host={host} port={port} cannot be used ({error}): choose another port or host") from error
    return sock


def build(options: ServeOptions, moved: dict[str, str], api_key: str | None) -> Server:
    """Load what is to be served."""
    import torch

    from firstlab.engine.engine import DecodeEngine
    from firstlab.hub.source import is_run, open_model, open_run
    from firstlab.serve.app import Limits, Server

    if is_run(options.run):
        if options.dtype:
            raise ValueError(f"dtype={options.dtype}: a run has its own; leave it out, or serve its lora folder")
        source = open_run(options.run, options.variant, moved)
    elif moved:
        raise ValueError(f"model.path is for run directories of firstlab.train; run={options.run} is none")
    else:
        source = open_model(options.run, options.variant, dtype=options.dtype or "auto")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but this machine has no CUDA device: use device=cpu")
    routed = source.model.routed
    routed.merge_and_unload().to(device).eval()
    room = getattr(routed.config.get_text_config(decoder=True), "max_position_embeddings", None)
    length = min(options.max_length, room or options.max_length)
    engine = DecodeEngine(routed, length, options.batch_size, patience=options.patience, reserve=options.reserve)
    limits = Limits(options.waiting, min(options.max_new_tokens, length - 1), options.max_body)
    return Server(source, engine, options.name or Path(options.run).resolve().name, limits, api_key)


if __name__ == "__main__":
    main(sys.argv[1:])
