"""The page as a person uses it, in a headless Chromium, and the code that it hands out."""

from __future__ import annotations

import contextlib
import gc
import io
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest

httpx = pytest.importorskip("httpx", reason="httpx is not installed")
gradio = pytest.importorskip("gradio", reason="gradio is not installed")
from meetjax.serve.page import snippets
from tests.serve.fake import FakeEngine
from tests.serve.loopback import serving, until

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
"""After each event Gradio sums up what it has done, by calls that pandas deprecates; they are no errors of ours."""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARTIFACT = Path("runs/page/page.png")


@contextlib.contextmanager
def leaks_allowed():
    """Gradio and Playwright leave event loops to the garbage collector; what is left in here is collected in here, without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


def held(context):
    """What a context gives, entered and left with leaks allowed: pytest has filters of its own at each of the two."""
    with leaks_allowed():
        stack = contextlib.ExitStack()
        inside = stack.enter_context(context)
    yield inside
    with leaks_allowed():
        stack.close()


@pytest.fixture(scope="module")
def page_served(model):
    yield from held(serving(FakeEngine(model, slots=8), model, page=True))


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    yield from held(chromium(sync))


@contextlib.contextmanager
def chromium(sync):
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def test_a_slider_changes_the_answer(page_served, browser):
    """Ask at 0, move the slider, ask the same again: another answer, what the engine says at that strength; and all from this machine."""
    from playwright.sync_api import expect

    page, addresses = browser.new_page(viewport={"width": 1400, "height": 1000}), []
    page.on("request", lambda request: addresses.append(request.url))
    page.goto(page_served.url)
    engine = page_served.engine

    def ask():
        """The ask behind the chat's answer, once that, the comparison and the curve have come."""
        before = len(engine.asked)
        page.locator("#message textarea").fill("a short answer?")
        page.locator("button#send").click()
        until(lambda: len(engine.asked) == before + 1 + 3 + 7 and engine.idle(), 30)
        asked = engine.asked[before]
        expect(page.locator("#chat [data-testid=bot]").last).to_have_text(engine.text(asked).strip(), timeout=20000)
        expect(page.locator("#curve svg")).to_have_count(2, timeout=20000)
        return asked

    first = ask()
    page.locator("#adapter-concise input[type=number]").fill("1.5")
    page.locator("#adapter-concise input[type=number]").press("Enter")
    page.locator("#adapter-harmless input[type=range]").focus()
    page.keyboard.press("End")
    second = ask()
    page.wait_for_timeout(500)
    ARTIFACT.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=ARTIFACT, full_page=True)
    assert (first.adapters, second.adapters) == ({}, {"concise": 1.5, "harmless": 2.0})
    assert engine.text(first) != engine.text(second)
    page.get_by_text("the same request as code").click()
    expect(page.locator("#curl")).to_contain_text('"concise": 1.5', timeout=20000)
    expect(page.locator("#curl")).to_contain_text('"harmless": 2')
    local = (page_served.url, "data:", "blob:")
    assert [address for address in addresses if not address.startswith(local)] == []
    page.close()


def test_snippets_do_what_the_page_did(page_served, model):
    """Both, run as they are, get the same answer."""
    openai = pytest.importorskip("openai", reason="the openai client is not installed")
    assert openai
    messages = [{"role": "user", "content": 'it\'s "short"\\ $HOME é?'}]
    body = {"model": "base", "messages": messages, "max_tokens": 40, "temperature": 0, "adapters": {"concise": -0.5}, "logit_dial": 1.2}
    curl, python = snippets(page_served.url + "/v1", body)
    expected = httpx.post(page_served.url + "/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(python, {})
    assert printed.getvalue() == expected + "\n"
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    done = subprocess.run(["bash", "-c", curl.replace("curl ", "curl -s ", 1)], capture_output=True, text=True, check=True)
    assert f'"content":{__import__("json").dumps(expected, ensure_ascii=False)}' in done.stdout


def test_routes_behind_the_page_answer_as_without_it(page_served):
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405), ("GET", "/health", 200)):
        reply = httpx.request(method, page_served.url + path)
        assert reply.status_code == status
        assert status == 200 or reply.json()["error"]["message"]
