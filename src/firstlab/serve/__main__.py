"""Serve a model to programs that speak to OpenAI's API.

    python -m firstlab.serve run=DIR                # a run directory of firstlab.train
    python -m firstlab.serve run=me/first-ende      # a folder or hub id of firstlab, or any causal LM
    FIRSTLAB_API_KEY=secret python -m firstlab.serve run=DIR host=0.0.0.0

Where a run's base model has moved, model.path=FOLDER says where it is.
"""

from __future__ import annotations

import socket
import sys
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from firstlab.config.command_line import guarded, read_options
from firstlab.serve import ServeOptions, api_key

if TYPE_CHECKING:
    from firstlab.serve.app import Server


@partial(guarded, resumes=False)
def main(arguments: list[str]) -> None:
    """Parse, load, serve until SIGTERM or Ctrl-C."""
    moved = [each for each in arguments if each.startswith("model.path=")]
    options = read_options(ServeOptions, [each for each in arguments if each not in moved], __doc__)
    if not options.run:
        raise ValueError("run=DIR is missing; try: python -m firstlab.serve run=DIR")
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"serving needs {error.name}: pip install 'firstlab[serve]'") from error
    if (key := api_key()) is None and options.host not in ("127.0.0.1", "::1", "localhost"):
        print(f"warning: everybody who reaches {options.host} may use this: set FIRSTLAB_API_KEY", file=sys.stderr)
    from firstlab.serve.app import Process

    with _listening(options.host, options.port) as sock:
        server = build(options, dict(each.split("=", 1) for each in moved), key)
        where = f"http://{options.host}:{sock.getsockname()[1]}"
        print(f"{server.name} at {where}/v1; metrics at {where}/metrics; SIGTERM or Ctrl-C ends it", flush=True)
        with suppress(KeyboardInterrupt):  # uvicorn raises again what it has ended on
            Process(server).run([sock])
        print("stopped", flush=True)


def _listening(host: str, port: int) -> socket.socket:
    """A socket at that place, from now on: a second server must not load its model in vain."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ValueError(f"host={host} port={port} cannot be used ({error}): choose another port or host") from error


def build(options: ServeOptions, moved: dict[str, str], api_key: str | None) -> Server:
    """Load what is to be served."""
    import torch

    from firstlab.engine.engine import DecodeEngine
    from firstlab.hub.source import is_run, open_model, open_run
    from firstlab.serve.app import Server

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
    return Server(source, engine, options, api_key)


if __name__ == "__main__":
    main(sys.argv[1:])
