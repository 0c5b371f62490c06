"""The page in a real Chromium, over a real server."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest

pytest.importorskip("gradio", reason="needs the extra: pip install 'firstlab[page]'")
pytest.importorskip("selenium", reason="needs a browser's driver: pip install selenium")
pytest.importorskip("uvicorn", reason="needs the extra: pip install 'firstlab[serve]'")
import httpx
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from firstlab.serve import ServeOptions, page
from firstlab.serve.__main__ import build
from firstlab.serve.client import Answer, ask
from support.serving import running, save_any_speed

PROMPT = "The old <b>farmer</b> sees a small dog."
TOKENS = 160
#: Notes every state of the text that the browser shows.
WATCH = """
window.parts = new Set()
setInterval(() => window.parts.add(document.querySelector("#routed textarea").value), 2)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = save_any_speed(tmp_path_factory.mktemp("page"))
    with running(build(ServeOptions(run=str(folder), device="cpu"), {}, None)) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs Chromium and its driver (Debian: apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,900"):
        options.add_argument(flag)
    started = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield started
    started.quit()


def asked(server: str, prompt: str, skip_rate: float) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": TOKENS, "skip_rate": skip_rate}
    return httpx.post(f"{server}/v1/completions", json=body, timeout=60).json()


def test_the_page_shows_both_answers_their_times_and_the_layers_that_ran(server: str, browser: Any) -> None:
    page_of = page.build(server, max_tokens=TOKENS)
    _, address, _ = page_of.launch(prevent_thread_lock=True, quiet=True, server_port=None, css=page.STYLE)
    try:
        browser.get(address)

        def find(css: str) -> list[Any]:
            return browser.find_elements(By.CSS_SELECTOR, css)

        def value(name: str) -> str:
            return find(f"#{name} textarea")[0].get_property("value")

        def until(condition: Callable[[], Any]) -> Any:
            drawn_anew = (StaleElementReferenceException, IndexError)
            return WebDriverWait(browser, 60, 0.02, drawn_anew).until(lambda _: condition())

        until(lambda: find("#prompt textarea"))
        until(lambda: find("input[type=radio][value=text]"))[0].click()
        box = until(lambda: find("#rate input[type=number]"))[0]
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys("0.3", Keys.TAB)
        find("#prompt textarea")[0].send_keys(PROMPT)
        routed, dense = (asked(server, PROMPT, rate) for rate in (0.3, 0.0))
        browser.execute_script(WATCH)
        find("#run")[0].click()
        until(lambda: "each" in find("#dense-times")[0].text)
        parts = browser.execute_script("return [...window.parts]")
        assert value("routed") == routed["choices"][0]["text"] and value("dense") == dense["choices"][0]["text"]
        # It came piece by piece.
        assert len({*parts} - {"", value("routed")}) >= 1 and all(value("routed").startswith(part) for part in parts)
        for name, answer in (("routed", routed), ("dense", dense)):
            shown = find(f"#{name}-times")[0].text
            assert f"{answer['usage']['skip_rate']:.0%} of layers skipped" in shown and "first token" in shown
        [strip] = find("#strips .strip")
        boxes = strip.find_elements(By.TAG_NAME, "i")
        ran = [index for index, each in enumerate(boxes) if "skipped" not in each.get_attribute("class")]
        assert ran == routed["usage"]["layers_run"] and len(ran) < len(boxes)
        assert "<b>farmer</b>" in find("#strips")[0].text  # as it was typed, not as HTML

        find("#prompt textarea")[0].send_keys(" Again.")
        find("#run")[0].click()
        until(lambda: len(find("#strips .strip")) == 2)
    finally:
        page_of.close()


def test_an_answer_comes_piece_by_piece(server: str) -> None:
    with httpx.Client(base_url=server) as client:
        texts, answer = [], Answer()
        for answer in ask(client, PROMPT, skip_rate=0.3, max_tokens=TOKENS):
            texts.append(answer.text)
    assert texts[-1] == asked(server, PROMPT, 0.3)["choices"][0]["text"]
    assert len(set(texts)) > 4 and all(after.startswith(before) for before, after in pairwise(texts))
    assert 0 < answer.first_s < answer.total_s and answer.usage["completion_tokens"] <= TOKENS


def test_what_the_server_refuses_is_said(server: str) -> None:
    with httpx.Client(base_url=server) as client, pytest.raises(ValueError, match="skip_rate=0.99"):
        list(ask(client, PROMPT, skip_rate=0.99, max_tokens=8))


def test_no_server_is_one_message() -> None:
    with pytest.raises(ValueError, match=r"url=http://127.0.0.1:9: .*start python -m firstlab.serve run=DIR first"):
        page.build("http://127.0.0.1:9", 8)


def test_a_strip_has_a_box_for_each_layer() -> None:
    html = page.strip({"layers_run": [0, 2]}, 3, "<i>")
    assert html.count("<i") == 3 and html.count("class=skipped") == 1 and "&lt;i&gt;" in html
    assert page.times(Answer()) == "…"
