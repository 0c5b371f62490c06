"""A page to try a served model on: its text beside the dense model's, both times, and which layers ran.

    python -m firstlab.serve.page url=http://127.0.0.1:8000   # of a running python -m firstlab.serve run=DIR

FIRSTLAB_API_KEY is sent to the server if it is set.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from html import escape
from typing import Any

from firstlab.config.command_line import guarded, parse_options
from firstlab.config.schema import check_options, option

ENDPOINTS = {"chat": "/v1/chat/completions", "text": "/v1/completions"}
STYLE = """
.strip { display: inline-flex; gap: 2px; vertical-align: middle; margin-right: 8px }
.strip i { width: 10px; height: 22px; border-radius: 2px; background: #0d9488 }
.strip i.skipped { background: transparent; box-shadow: inset 0 0 0 1px #94a3b8 }
"""


@dataclass
class PageOptions:
    """Options of `python -m firstlab.serve.page`: the server's url, and where the page listens."""

    url: str = "http://127.0.0.1:8000"
    host: str = "127.0.0.1"
    port: int = option(7860, least=0, most=65535)
    max_tokens: int = option(128, least=1)  # of a response


@dataclass
class Answer:
    """A response as far as it has come; `usage` is empty until its end."""

    text: str = ""
    first_s: float = 0.0
    total_s: float = 0.0
    usage: dict[str, Any] = field(default_factory=dict)

    def times(self) -> str:
        """What it took, once it has ended."""
        if not self.usage:
            return "…"
        steps = max(1, self.usage["completion_tokens"] - 1)
        per_token = 1e3 * (self.total_s - self.first_s) / steps
        skipped = f"{self.usage['skip_rate']:.0%} of layers skipped"
        return f"{self.total_s:.2f} s: first token {1e3 * self.first_s:.0f} ms, then {per_token:.1f} ms each; {skipped}"


def ask(client: Any, kind: str, prompt: str, skip_rate: float | None, max_tokens: int) -> Iterator[Answer]:
    """The answer each time that more of it has come; ValueError with the server's message if it refuses."""
    said = {"messages": [{"role": "user", "content": prompt}]} if kind == "chat" else {"prompt": prompt}
    body = {**said, "max_tokens": max_tokens, "stream": True, "stream_options": {"include_usage": True}}
    answer, begun = Answer(), time.perf_counter()
    with client.stream("POST", ENDPOINTS[kind], json={**body, "skip_rate": skip_rate}) as response:
        if response.status_code != 200:
            raise ValueError(json.loads(response.read())["error"]["message"])
        for line in response.iter_lines():
            event = json.loads(line.removeprefix("data: ")) if line.startswith("data: {") else {}
            if "error" in event:
                raise ValueError(event["error"]["message"])
            answer.usage = event.get("usage") or answer.usage
            for choice in event.get("choices", []):
                answer.total_s = time.perf_counter() - begun
                if piece := choice["delta"].get("content", "") if kind == "chat" else choice["text"]:
                    answer.first_s, answer.text = answer.first_s or answer.total_s, answer.text + piece
            yield answer


def strip(usage: dict[str, Any], layers: int, prompt: str) -> str:
    """One line of HTML: a box for each layer, filled where it ran."""
    ran = set(usage["layers_run"])
    boxes = "".join(f'<i{"" if each in ran else " class=skipped"} title="layer {each}"></i>' for each in range(layers))
    return f'<div><span class="strip">{boxes}</span>{escape(prompt.strip()[-80:])}</div>'


def build(url: str, max_tokens: int) -> Any:
    """The page as Gradio's Blocks; ValueError if the package is missing or no server answers."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio as gr
        import httpx
    except ImportError as error:
        raise ValueError(f"the page needs {error.name}: pip install 'firstlab[page]'") from error
    key = os.environ.get("FIRSTLAB_API_KEY")
    client = httpx.Client(base_url=url, timeout=600, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        [model] = client.get("/v1/models").raise_for_status().json()["data"]
    except httpx.HTTPError as error:
        raise ValueError(f"url={url}: {error}; start python -m firstlab.serve run=DIR first") from error
    layers, highest = model["num_layers"], model["highest_skip_rate"]

    def compare(kind: str, prompt: str, rate: float, seen: list[str]) -> Iterator[tuple[Any, ...]]:
        """First the routed answer, then the dense one: at once, each would slow the other."""
        routed, dense, strips = Answer(), Answer(), seen
        try:
            for routed in ask(client, kind, prompt, None if highest is None else rate, max_tokens):
                yield routed.text, routed.times(), "", "", "".join(strips), strips
            strips = [strip(routed.usage, layers, prompt), *seen]
            for dense in ask(client, kind, prompt, 0, max_tokens):
                yield routed.text, routed.times(), dense.text, dense.times(), "".join(strips), strips
        except (ValueError, httpx.HTTPError) as error:
            raise gr.Error(str(error)) from error

    def side(label: str, name: str) -> tuple[Any, Any]:
        with gr.Column():
            return gr.Textbox(label=label, lines=6, elem_id=name), gr.Markdown(elem_id=f"{name}-times")

    with gr.Blocks(title=f"firstlab: {model['id']}", analytics_enabled=False) as page:
        gr.Markdown(f"# {model['id']}\nWhich of its {layers} layers a prompt needs, and what skipping the rest gives.")
        prompt = gr.Textbox(label="Prompt", lines=3, elem_id="prompt")
        with gr.Row():
            kind = gr.Radio([*ENDPOINTS], value="chat", label="Sent as")
            most = highest or 1  # without a rate the model decides by itself
            rate = gr.Slider(0, most, most / 2, step=0.01, label="Skip rate", visible=bool(highest), elem_id="rate")
            button = gr.Button("Run", variant="primary", elem_id="run")
        with gr.Row():
            (routed, routed_times), (dense, dense_times) = side("With skipping", "routed"), side("Every layer", "dense")
        gr.Markdown("Layers that ran, prompt by prompt; the newest is on top:")
        strips, seen = gr.HTML(elem_id="strips"), gr.State([])
        given, shown = [kind, prompt, rate, seen], [routed, routed_times, dense, dense_times, strips, seen]
        gr.on([button.click, prompt.submit], compare, given, shown, concurrency_limit=1)
    return page


@partial(guarded, resumes=False)
def main(arguments: list[str]) -> None:
    """Parse, look for the server, show the page until Ctrl-C."""
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\n{PageOptions.__doc__}")
        return
    options, words = parse_options(PageOptions(), arguments)
    if words:
        raise ValueError(f"{words[0]!r} is not KEY=VALUE; see python -m firstlab.serve.page --help")
    check_options(options)
    build(options.url, options.max_tokens).launch(server_name=options.host, server_port=options.port, css=STYLE)


if __name__ == "__main__":
    main(sys.argv[1:])
