"""A server over real sockets: answers are those of `generate`, errors are OpenAI's, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("uvicorn", reason="needs the extra: pip install 'firstlab[serve]'")
import httpx
from hypothesis import given, settings
from hypothesis import strategies as st

from firstlab.data.encoding import prompt_ids
from firstlab.data.mini_qa import MiniQA
from firstlab.data.mini_translation import MiniTranslation
from firstlab.engine.engine import DecodeEngine
from firstlab.engine.sampling import Sampling
from firstlab.model.routes import FixedRoutes
from firstlab.serve import ServeOptions, load
from firstlab.serve.__main__ import build, main
from firstlab.serve.app import Server
from firstlab.serve.protocol import ApiError, Chat, parse
from firstlab.serve.text import TextStream, prompt_of
from support.models import LAYERS
from support.serving import CHAT_TEMPLATE, running, save_any_speed
from support.texts import TEXT

WORDS = " ".join(TEXT).split()
NEW = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_any_speed(tmp_path_factory.mktemp("serve"))


def made(folder: Path, api_key: str | None = None, **options: Any) -> Server:
    given_ = {"max_new_tokens": NEW, "batch_size": 5, "device": "cpu", **options}
    return build(ServeOptions(run=str(folder), **given_), {}, api_key)


@pytest.fixture(scope="module")
def server(folder: Path) -> Server:
    return made(folder)


@pytest.fixture(scope="module")
def address(server: Server):
    with running(server) as address:
        yield address


class Asked(NamedTuple):
    """A request and the answer that it must get."""

    body: dict[str, Any]
    text: str
    tokens: int
    layers: list[int]


def questions(server: Server, count: int, seed: int = 0) -> list[Asked]:
    """Prompts of 1 to 60 tokens with limits of 1 to 24, several rates, a few drawn, with the answers of `generate`."""
    draw, tokenizer, model = random.Random(seed), server.source.tokenizer, server.source.model.routed
    other = DecodeEngine(model, 128, 1)
    found = []
    for number in range(count):
        prompt = " ".join(draw.choices(WORDS, k=draw.randint(1, 14)))
        ids = prompt_ids(tokenizer, prompt)
        rate, limit = draw.choice([None, 0, 0.1, 0.3, 0.45]), draw.randint(1, NEW)
        body = {"prompt": draw.choice([prompt, ids]), "max_tokens": limit, "skip_rate": rate}
        forced = {"routes": torch.ones(LAYERS, dtype=torch.bool)} if rate == 0 else {"skip_rate": rate}
        if number % 6 == 5:
            body |= {"temperature": 0.8, "top_k": 12, "seed": number}
            sampling = Sampling(0.8, 12, seed=number)
            tokens = other.generate([ids], limit, sampling=sampling, eos=server.ends, **forced).tokens[0]
        else:
            out = model.generate(
                torch.tensor([ids]), max_new_tokens=limit, do_sample=False, eos_token_id=server.ends, **forced
            )
            tokens = out[0, len(ids) :].tolist()
        route = torch.ones(LAYERS).bool() if rate == 0 else model.route(torch.tensor([ids]), skip_rate=rate)[0]
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        found.append(Asked(body, text, len(tokens), route.nonzero().flatten().tolist()))
    return found


async def ask(client: httpx.AsyncClient, asked: Asked, stream: bool) -> None:
    """The answer is right, whole or in pieces."""
    body = asked.body | {"stream": stream, "stream_options": {"include_usage": True} if stream else None}
    if not stream:
        answer = (await client.post("/v1/completions", json=body)).raise_for_status().json()
        [choice], usage = answer["choices"], answer["usage"]
        text, reason = choice["text"], choice["finish_reason"]
    else:
        text, reason, usage, last = "", None, None, None
        async with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.raise_for_status().headers["content-type"].startswith("text/event-stream")
            async for line in response.aiter_lines():
                last = line or last
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    usage = event.get("usage", usage)
                    for choice in event["choices"]:
                        text += choice["text"]
                        reason = choice["finish_reason"] or reason
        assert last == "data: [DONE]"
    assert text == asked.text
    assert usage["completion_tokens"] == asked.tokens and usage["layers_run"] == asked.layers
    assert usage["skip_rate"] == pytest.approx(1 - len(asked.layers) / LAYERS)
    assert reason == ("length" if asked.tokens == asked.body["max_tokens"] else "stop") or reason == "stop"


async def hang_up(client: httpx.AsyncClient, asked: Asked, stream: bool) -> None:
    """Leave before the answer is complete."""
    body = asked.body | {"stream": stream, "max_tokens": NEW}
    if stream:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            async for _ in response.aiter_lines():
                break
    else:
        with suppress(httpx.ReadTimeout):
            await client.post("/v1/completions", json=body, timeout=httpx.Timeout(5, read=0.002))


def test_load(server: Server, address: str) -> None:
    """200 requests, 16 at once, a tenth of whose clients hang up: every other answer is that of `generate`."""
    asked = questions(server, 30)
    draw = random.Random(1)

    async def everyone() -> None:
        turns = asyncio.Semaphore(16)
        limits = httpx.Limits(max_connections=16)
        async with httpx.AsyncClient(base_url=address, limits=limits, timeout=60) as client:

            async def one(number: int) -> None:
                async with turns:
                    act = hang_up if number % 10 == 9 else ask
                    await act(client, draw.choice(asked), draw.random() < 0.5)

            await asyncio.gather(*map(one, range(200)))

    asyncio.run(everyone())
    for _ in range(500):
        told = metrics(address)
        answered = sum(n for name, n in told.items() if name.startswith("firstlab_requests_total"))
        if answered == 200 and told["firstlab_requests_running"] == told["firstlab_requests_waiting"] == 0:
            break
        time.sleep(0.01)
    assert answered == 200 and told["firstlab_requests_running"] == told["firstlab_requests_waiting"] == 0
    assert told["firstlab_ttft_seconds_count"] >= 180 and not server.worker.jobs
    assert told["firstlab_union_layers_total"] <= LAYERS * told["firstlab_decode_steps_total"]
    run, skipped = (told[f'firstlab_layers_total{{state="{state}"}}'] for state in ("run", "skipped"))
    assert 0.05 < skipped / (run + skipped) < 0.5
    assert len({tuple(each.layers) for each in asked}) > 3 and len({each.text for each in asked}) > 12


def metrics(address: str) -> dict[str, float]:
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs if "_created" not in name}


def test_a_client_that_hangs_up_frees_its_place(server: Server, address: str) -> None:
    before = metrics(address)["firstlab_generated_tokens_total"]
    engine, waits = server.worker.engine, threading.Event()
    step = engine.step.__class__.__call__

    def slow(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        waits.wait(0.05)
        return step(self, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.step.__class__, "__call__", slow)
        for stream in (True, False):
            body = {"prompt": "the red house", "max_tokens": NEW, "stream": stream}
            with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=0.2) as client:
                if stream:
                    with client.stream("POST", f"{address}/v1/completions", json=body) as response:
                        for _ in response.iter_raw():
                            raise httpx.ReadTimeout("the client leaves")
                client.post(f"{address}/v1/completions", json=body)
            for _ in range(100):
                if not server.worker.jobs:
                    break
                time.sleep(0.01)
            assert not server.worker.jobs
    assert metrics(address)["firstlab_generated_tokens_total"] - before < NEW  # for both
    assert httpx.post(f"{address}/v1/completions", json={"prompt": "the", "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_chat_by_the_template(server: Server, address: str, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.source.tokenizer, "chat_template", CHAT_TEMPLATE)
    parts = [{"type": "text", "text": "the small"}, {"type": "text", "text": " dog"}]
    messages = [{"role": "system", "content": "sleeps"}, {"role": "user", "content": parts}]
    body = {"messages": messages, "max_completion_tokens": 9, "model": server.name, "n": 1, "user": "me"}
    body |= {"logprobs": False, "frequency_penalty": 0.0, "tools": [], "seed": None, "metadata": {"a": "b"}}
    text = "<system>sleeps<user>the small dog<answer>"
    plain = httpx.post(f"{address}/v1/completions", json={"prompt": text, "max_tokens": 9}).json()
    answer = httpx.post(f"{address}/v1/chat/completions", json=body | {"stream": stream})
    if stream:
        events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        assert {event["object"] for event in events} == {"chat.completion.chunk"}
        assert events[0]["choices"][0]["delta"]["role"] == "assistant" and "usage" not in events[-1]
        said = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
        reason = events[-1]["choices"][0]["finish_reason"]
    else:
        [choice] = answer.json()["choices"]
        assert choice["message"]["role"] == "assistant" and answer.json()["usage"] == plain["usage"]
        said, reason = choice["message"]["content"], choice["finish_reason"]
    assert (said, reason) == (plain["choices"][0]["text"], plain["choices"][0]["finish_reason"])
    refused = httpx.post(f"{address}/v1/chat/completions", json={"messages": messages[::-1]})
    assert refused.status_code == 400 and "system comes first" in refused.json()["error"]["message"]


def test_chat_of_a_run_is_the_text_of_its_task(server: Server) -> None:
    def prompt(task: Any, *messages: dict[str, str]) -> list[int]:
        asked = parse(Chat, json.dumps({"messages": messages}).encode())
        return prompt_of(server.source._replace(task=task), asked)

    user = {"role": "user", "content": "The dog sleeps."}
    ids = prompt(MiniTranslation(), user)
    text = server.source.tokenizer.decode(ids, skip_special_tokens=True)
    assert "English to German" in text and "### Input:\nThe dog sleeps.\n" in text
    with pytest.raises(ApiError, match="send one of role user"):
        prompt(MiniTranslation(), {"role": "system", "content": "x"}, user)
    for task in (None, MiniQA()):
        with pytest.raises(ApiError, match="no chat template; use /v1/completions"):
            prompt(task, user)


BAD: list[tuple[str, Any, int, str | None, str]] = [
    ("completions", {}, 400, "prompt", "prompt is missing"),
    ("completions", {"prompt": 5}, 400, "prompt", "prompt=5: Input should be a valid string or"),
    ("completions", {"prompt": []}, 400, "prompt", "empty"),
    ("completions", {"prompt": [5, 10**6]}, 400, "prompt", "token 1000000: give ids from 0 to"),
    ("completions", {"prompt": "x", "temperature": 3}, 400, "temperature", "temperature=3: .*less than or equal to 2"),
    ("completions", {"prompt": "x", "temperature": "1"}, 400, "temperature", "valid number"),
    ("completions", {"prompt": "x", "top_p": 0}, 400, "top_p", "top_p=0: .*greater than 0"),
    ("completions", {"prompt": "x", "max_tokens": 0}, 400, "max_tokens", "max_tokens=0: .*greater than or equal to 1"),
    ("completions", {"prompt": "x", "max_tokens": -1}, 400, "max_tokens", "greater than or equal to 1"),
    ("completions", {"prompt": "x", "n": 2}, 400, "n", "n=2: this server takes only n=1; leave it out"),
    ("completions", {"prompt": "x", "logprobs": 0}, 400, "logprobs", "takes only logprobs=False"),
    ("completions", {"prompt": "x", "logit_bias": {"5": 1}}, 400, "logit_bias", "takes only logit_bias={}"),
    ("completions", {"prompt": "x", "suffix": "y"}, 400, "suffix", "suffix='y': this server does not know the field"),
    ("completions", {"prompt": "x", "stop": ""}, 400, "stop", "at least 1 character"),
    ("completions", {"prompt": "x", "stop": ["a"] * 5}, 400, "stop", "at most 4 items"),
    ("completions", {"prompt": "x", "max_tokens": NEW + 1}, 400, "max_tokens", "max_tokens=25: .*at most 24"),
    ("completions", {"prompt": [5] * 2040, "max_tokens": 9}, 400, "max_tokens", "2040 tokens and .*=9, .*2048"),
    ("completions", {"prompt": [5] * 2048}, 400, "max_tokens", "shorten the prompt"),
    ("completions", {"prompt": "x", "skip_rate": 0.9}, 400, "skip_rate", "skip_rate=0.9 must lie between 0 and 0.5"),
    ("completions", {"prompt": "x", "skip_rate": 1}, 400, "skip_rate", "skip_rate=1: .*less than 1"),
    ("completions", {"prompt": "x", "model": "other"}, 404, "model", "model='other' is not served here; ask for"),
    ("completions", ["x"], 400, None, "body=.*object"),
    ("completions", b"{", 400, None, "not valid JSON"),
    ("completions", b'{"prompt": "\\ud800"}', 400, None, "not valid JSON"),
    ("completions", b" " * 10**6, 413, None, "more than 262144 bytes"),
    ("chat/completions", {"messages": []}, 400, "messages", "at least 1 item"),
    ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}, 400, "messages", "no chat template"),
    ("chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role", "robot"),
    ("chat/completions", {"messages": [{"role": "user"}]}, 400, "messages.0.content", "missing"),
    ("nothing", {}, 404, None, "try POST"),
]


@pytest.mark.parametrize(("path", "body", "status", "param", "message"), BAD)
def test_bad_requests(address: str, path: str, body: Any, status: int, param: str | None, message: str) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(f"{address}/v1/{path}", content=data, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert re.search(message, error["message"])


def test_other_methods_and_types_of_content(address: str) -> None:
    assert httpx.get(f"{address}/v1/completions").status_code == 405
    answer = httpx.post(f"{address}/v1/completions", content='{"prompt": "x"}', headers={"Content-Type": "text/plain"})
    assert answer.status_code == 415 and "text/plain" in answer.json()["error"]["message"]
    [model] = httpx.get(f"{address}/v1/models").json()["data"]
    assert (model["id"], model["num_layers"], model["highest_skip_rate"]) == ("routed", LAYERS, 0.5)
    assert httpx.get(f"{address}/v1/models/routed").json() == model and model["created"] > 0
    unknown = httpx.get(f"{address}/v1/models/gpt-4")
    assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "model_not_found"
    assert httpx.get(f"{address}/health").json() == {"status": "ok", "model": "routed"}


def inside(server: Server, work: Any) -> Any:
    """Run `work(client)` beside a server without a socket, whose engine the work starts."""

    async def run() -> Any:
        app = server.app()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            return await work(client, app.router.lifespan_context(app))

    return asyncio.run(run())


def test_more_requests_than_may_wait(folder: Path) -> None:
    server = made(folder, batch_size=1, waiting=1)

    async def work(client: httpx.AsyncClient, engine: Any) -> None:
        body = {"prompt": "the dog", "max_tokens": 3}
        waiting = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(2)]
        while len(server.worker.jobs) < 2:
            await asyncio.sleep(0.01)
        refused = await client.post("/v1/completions", json=body)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        error = refused.json()["error"]
        assert (error["code"], error["type"]) == ("queue_full", "rate_limit_error") and "again later" in error[
            "message"
        ]
        async with engine:
            assert [(await each).status_code for each in waiting] == [200, 200]
            assert (await client.post("/v1/completions", json=body)).status_code == 200

    inside(server, work)


def test_a_failing_engine_refuses_and_goes_on(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = made(folder)
    engine = server.worker.engine
    prefill, failures = engine._prefill, [True]

    def failing(requests: Any) -> None:
        if failures.pop() if failures else False:
            raise RuntimeError("no such kernel")
        prefill(requests)

    engine._prefill = failing  # type: ignore[method-assign]

    async def work(client: httpx.AsyncClient, running: Any) -> None:
        body = {"prompt": "the dog", "max_tokens": 3}
        async with running:
            failed = await client.post("/v1/completions", json=body)
            assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error"
            failures.append(True)
            streamed = await client.post("/v1/completions", json=body | {"stream": True})
            assert "server_error" in streamed.text and "[DONE]" not in streamed.text
            assert (await client.post("/v1/completions", json=body)).status_code == 200
            assert not server.worker.jobs

            failures.append(True)
            engine.batch = failing  # type: ignore[method-assign]
            assert (await client.post("/v1/completions", json=body)).status_code == 500
            while server.worker.alive:
                await asyncio.sleep(0.01)
            assert (await client.post("/v1/completions", json=body)).status_code == 503
            assert (await client.get("/health")).status_code == 503

    inside(server, work)
    assert "no such kernel" in caplog.text


def test_stops_end_a_response_and_free_its_place(server: Server, address: str) -> None:
    [asked] = [each for each in questions(server, 12, seed=3) if each.tokens > 12][:1]
    whole = asked.text
    stop = whole[5:8]
    for stream in (False, True):
        body = asked.body | {"stop": [stop, "never"], "stream": stream}
        answer = httpx.post(f"{address}/v1/completions", json=body)
        if stream:
            events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
            text = "".join(event["choices"][0]["text"] for event in events)
            reason = events[-1]["choices"][0]["finish_reason"]
        else:
            text, reason = (answer.json()["choices"][0][key] for key in ("text", "finish_reason"))
            assert answer.json()["usage"]["completion_tokens"] <= asked.tokens
        assert (text, reason) == (whole[: whole.index(stop)], "stop")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 399), max_size=30), st.lists(st.text("aeh ünd", min_size=1, max_size=3), max_size=2))
def test_text_comes_in_pieces_that_add_up(server: Server, tokens: list[int], stops: list[str]) -> None:
    tokenizer = server.source.tokenizer
    tokens = [token for token in tokens if token < len(tokenizer) and token not in server.ends]
    whole, stream, text = tokenizer.decode(tokens, skip_special_tokens=True), TextStream(tokenizer, (), stops), ""
    for token in [*tokens, None]:
        text += stream.feed(token)
        assert whole.startswith(text)
        if stream.stopped:
            break
    cuts = [whole.index(stop) for stop in stops if stop in whole]
    assert text == (whole[: min(cuts)] if cuts else whole) and stream.stopped == bool(cuts)


def test_an_api_key(folder: Path) -> None:
    server = made(folder, "secret-key")

    async def work(client: httpx.AsyncClient, engine: Any) -> None:
        async with engine:
            for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret-key"}):
                for answer in (
                    await client.post("/v1/completions", json={"prompt": "x"}, headers=header),
                    await client.get("/v1/models", headers=header),
                ):
                    assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            key = {"Authorization": "Bearer secret-key"}
            answer = await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}, headers=key)
            assert answer.status_code == 200
            assert (await client.get("/health")).status_code == 200

    inside(server, work)


def test_fixed_routes_take_no_rate_but_zero(folder: Path) -> None:
    server = made(folder)
    server.source.model.routed.lm.generation_config.repetition_penalty = 1.9  # only what requests say counts
    route = torch.tensor([True, False, True, True, False, True])
    server.source = server.source._replace(routes=FixedRoutes(route))

    async def work(client: httpx.AsyncClient, engine: Any) -> None:
        async with engine:
            for rate, layers in ((None, [0, 2, 3, 5]), (0, list(range(LAYERS)))):
                body = {"prompt": "the dog", "max_tokens": 3, "skip_rate": rate}
                answer = await client.post("/v1/completions", json=body)
                assert answer.json()["usage"]["layers_run"] == layers
            refused = await client.post("/v1/completions", json={"prompt": "the dog", "skip_rate": 0.3})
            assert refused.status_code == 400
            assert "skip_rate=0.3: the layers of this model are fixed" in refused.json()["error"]["message"]

    inside(server, work)


def terminated(folder: Path, *options: str, tokens: int) -> tuple[str, list[str]]:
    """The address of a server that gets SIGTERM after a stream's first line, and all lines of the stream."""
    lines: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"

    def client() -> None:
        try:
            for _ in range(3000):
                with suppress(httpx.HTTPError):
                    httpx.get(f"{address}/health").raise_for_status()
                    break
                time.sleep(0.01)
            body = {"prompt": "the dog", "max_tokens": tokens, "stream": True}
            key = {"Authorization": "Bearer secret-key"}
            with httpx.stream("POST", f"{address}/v1/completions", json=body, headers=key, timeout=60) as response:
                events = response.iter_lines()
                lines.append(next(events))
                os.kill(os.getpid(), signal.SIGTERM)
                lines.extend(line for line in events if line)
        finally:
            if not lines:
                os.kill(os.getpid(), signal.SIGTERM)  # so that this ends

    thread = threading.Thread(target=client)
    thread.start()
    main([f"run={folder}", f"port={port}", "device=cpu", "name=tiny", *options])
    thread.join()
    return address, lines


def test_sigterm_lets_running_requests_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FIRSTLAB_API_KEY", "secret-key\n")  # as secrets in files often end
    address, lines = terminated(folder, "max_length=128", tokens=100)
    assert len(lines) > 1 and lines[-1] == "data: [DONE]"
    out, err = capfd.readouterr()
    assert out.startswith(f"tiny at {address}/v1;") and out.endswith("stopped\n")
    assert "secret-key" not in out + err


def test_requests_are_told_when_the_grace_is_over(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _, lines = terminated(folder, "max_length=2048", "max_new_tokens=2000", "grace=0", tokens=2000)
    assert "the server has stopped" in lines[-1] and len(lines) < 2000
    out, err = capfd.readouterr()
    assert out.endswith("stopped\n") and "Traceback" not in err


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit):
        main(["run=x", f"port={(port := taken.getsockname()[1])}"])
    assert f"host=127.0.0.1 port={port} cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "run=DIR is missing"),
        (["run=x", "port=99999"], "port=99999 is not allowed"),
        (["run=x", "prot=1"], "prot is unknown"),
        (["run=/nowhere", "port=0"], "/nowhere"),
        (["run=/nowhere", "port=0", "model.path=y"], "model.path is for run directories"),
    ],
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_measuring_a_server(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["requests=5", "concurrency=3", "rounds=1", "max_tokens=4"]
    load.main([f"url={address}", *few, "skip_rates=0,0.3,null", f"out={tmp_path / 'load.json'}"])
    record = json.loads((tmp_path / "load.json").read_text())
    dense, some, own = record["variants"]
    assert record["settings"]["concurrency"] == 3 and record["device"] and record["model"]["id"] == "routed"
    assert dense["speed_up"] == 1 and some["speed_up"] > 0
    assert (dense["asked"], some["asked"], own["asked"]) == (0, 0.3, None)
    assert dense["skip_rate"] == 0 and dense["union_layers"] == LAYERS and 0 <= some["skip_rate"] < 1
    for row in (dense, some, own):
        assert row["tokens_per_s"] > 0 and 0 < row["ttft_ms"] <= row["ttft_p95_ms"] and row["tpot_ms"] > 0
        assert 0 < row["union_layers"] <= LAYERS and len(row["rounds"]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 4
    for arguments, message in (
        ([f"url={address}", *few, "skip_rates=0.9"], "skip_rate=0.9 must lie between"),
        (["url=http://127.0.0.1:9", *few], "url=http://127.0.0.1:9 gave no answer"),
        (["requests=0"], "requests=0 is not allowed"),
        (["skip_rates=0,x"], "skip_rates='0,x': give numbers or null"),
    ):
        with pytest.raises(SystemExit) as stopped:
            load.main(arguments)
        assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (main, load.main):
        with pytest.raises(SystemExit) as stopped:
            command(["--help"])
        assert stopped.value.code == 0
    assert capsys.readouterr().out.count("FIRSTLAB_API_KEY") > 2
