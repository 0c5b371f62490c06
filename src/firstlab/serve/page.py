"""A page to try a served model on: its text beside the dense model's, both times, and which layers ran.

    python -m firstlab.serve.page url=http://127.0.0.1:8000   # of a running python -m firstlab.serve run=DIR

FIRSTLAB_API_KEY is sent to the server if it is set.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

import httpx

from firstlab.config.command_line import guarded, read_options
from firstlab.config.schema import option
from firstlab.serve.client import Answer, ask, connect

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


def times(answer: Answer) -> str:
    """What an answer took, once it has ended."""
    if not answer.usage:
        return "…"
    skipped = f"{answer.usage['skip_rate']:.0%} of layers skipped"
    first, each = 1e3 * answer.first_s, 1e3 * answer.per_token_s
    return f"{answer.total_s:.2f} s: first token {first:.0f} ms, then {each:.1f} ms each; {skipped}"


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
    except ImportError as error:
        raise ValueError(f"the page needs {error.name}: pip install 'firstlab[page]'") from error
    client = connect(url)
    try:
        [model] = client.get("/v1/models").raise_for_status().json()["data"]
    except httpx.HTTPError as error:
        raise ValueError(f"url={url}: {error}; start python -m firstlab.serve run=DIR first") from error
    layers, highest = model["num_layers"], model["highest_skip_rate"]

    def compare(kind: str, prompt: str, rate: float, seen: list[str]) -> Iterator[tuple[Any, ...]]:
        """First the routed answer, then the dense one: at once, each would slow the other."""
        routed, dense, strips = Answer(), Answer(), seen
        ask_server = partial(ask, client, prompt, kind == "chat", max_tokens=max_tokens)
        try:
            for routed in ask_server(skip_rate=None if highest is None else rate):
                yield routed.text, times(routed), "", "", "".join(strips), strips
            strips = [strip(routed.usage, layers, prompt), *seen]
            for dense in ask_server(skip_rate=0):
                yield routed.text, times(routed), dense.text, times(dense), "".join(strips), strips
        except (ValueError, httpx.HTTPError) as error:
            raise gr.Error(str(error)) from error

    def side(label: str, name: str) -> tuple[Any, Any]:
        with gr.Column():
            return gr.Textbox(label=label, lines=6, elem_id=name), gr.Markdown(elem_id=f"{name}-times")

    with gr.Blocks(title=f"firstlab: {model['id']}", analytics_enabled=False) as page:
        gr.Markdown(f"# {model['id']}\nWhich of its {layers} layers a prompt needs, and what skipping the rest gives.")
        prompt = gr.Textbox(label="Prompt", lines=3, elem_id="prompt")
        with gr.Row():
            kind = gr.Radio(["chat", "text"], value="chat", label="Sent as")
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
    options = read_options(PageOptions, arguments, __doc__)
    build(options.url, options.max_tokens).launch(server_name=options.host, server_port=options.port, css=STYLE)


if __name__ == "__main__":
    main(sys.argv[1:])
