"""A tiny model of any rate with its tokenizer in a folder, and a server of it on a free port."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import uvicorn
from transformers import AutoTokenizer

from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.settings import RouterSettings
from firstlab.serve.app import Server
from support.models import LAYERS, filled
from support.tiny_run import save_tiny_model

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
)


def save_any_speed(folder: Path) -> Path:
    """Weights are large enough that tokens differ, and routers choose differently."""
    base = save_tiny_model(folder / "plain", LAYERS)
    model = RouterAugmentedLM.from_pretrained(base, settings=RouterSettings(kind="routes", price="length"))
    with torch.no_grad():
        for name, parameter in model.lm.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3 if "embed" in name else 12)
    filled(model.routers)
    model.save_pretrained(folder / "routed", save_base=True)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "routed")
    return folder / "routed"


@contextmanager
def running(server: Server, port: int = 0) -> Iterator[str]:
    """The server on a port, a free one by default, in a thread; its address."""
    with socket.create_server(("127.0.0.1", port)) as sock:
        process = uvicorn.Server(uvicorn.Config(server.app(), log_level="warning", timeout_graceful_shutdown=5))
        thread = threading.Thread(target=process.run, args=([sock],))
        thread.start()
        try:
            while not process.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            process.should_exit = True
            thread.join()
