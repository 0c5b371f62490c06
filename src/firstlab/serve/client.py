"""Ask a server for text as it comes, with times: what the page shows and the load generator measures."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from firstlab.serve import api_key


@dataclass
class Answer:
    """A response as far as it has come; `usage` is empty until its end."""

    text: str = ""
    first_s: float = 0.0
    total_s: float = 0.0
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def per_token_s(self) -> float:
        """Seconds for each token after the first."""
        return (self.total_s - self.first_s) / max(1, self.usage["completion_tokens"] - 1)


def connect(url: str) -> httpx.Client:
    """A client that sends the API key in FIRSTLAB_API_KEY, if there is one."""
    headers = {"Authorization": f"Bearer {key}"} if (key := api_key()) else {}
    unlimited = httpx.Limits()  # by default a hundred connections
    return httpx.Client(base_url=url, headers=headers, timeout=600, limits=unlimited)


def ask(client: httpx.Client, prompt: str, chat: bool = False, **asked: Any) -> Iterator[Answer]:
    """The answer each time that more of it has come; ValueError with the server's message if it refuses."""
    path = "/v1/chat/completions" if chat else "/v1/completions"
    body = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    body |= {"stream": True, "stream_options": {"include_usage": True}, **asked}
    answer, begun = Answer(), time.perf_counter()
    with client.stream("POST", path, json=body) as response:
        if response.status_code != 200:
            raise ValueError(json.loads(response.read())["error"]["message"])
        for line in response.iter_lines():
            event = json.loads(line.removeprefix("data: ")) if line.startswith("data: {") else {}
            if "error" in event:
                raise ValueError(event["error"]["message"])
            answer.usage = event.get("usage") or answer.usage
            for choice in event.get("choices", []):
                answer.total_s = time.perf_counter() - begun
                if piece := choice["delta"]["content"] if chat else choice["text"]:
                    answer.first_s, answer.text = answer.first_s or answer.total_s, answer.text + piece
            yield answer
    if not answer.usage:
        raise ValueError(f"{client.base_url} ended an answer too early: its log says why")
    answer.first_s = answer.first_s or answer.total_s
