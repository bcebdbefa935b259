"""The page: a chat with a slider for every adapter, one prompt at three strengths, a curve over all of them, and the request as code.

Gradio, mounted in the server's own app; nothing on it comes from another machine.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from html import escape
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
from fastapi import FastAPI
from gradio.themes import Soft

from meetjax.data.records import Message
from meetjax.errors import MeetjaxError
from meetjax.evaluate.plots import against_strength, to_svg
from meetjax.generate.requests import encode_prompt
from meetjax.generate.sampling import Sampling
from meetjax.models.load import Model
from meetjax.serve.stream import Ask, QueueFull
from meetjax.serve.trials import Trial, along, give_up, log_ratio, run

LOWEST, HIGHEST = -1.0, 2.0
CURVE = tuple(LOWEST + 0.5 * i for i in range(7))
THREE = (0.0, 1.0, 1.5)
CURVE_TOKENS = 64
"""New tokens of an answer on the curve, at most."""
Turns = list[dict[str, str]]
"""A conversation, as the chat shows it and as a request holds it."""

CSS = """
:root { --ink: #1f2933; --muted: #7b8794; --grid: #e4e7eb; --band: #f0f4f8; --kind0: #0b6e99; --kind1: #b4541a }
.dark { --ink: #e4e7eb; --muted: #9aa5b1; --grid: #3e4c59; --band: #27323d; --kind0: #62c3e8; --kind1: #f0a070 }
.gradio-container main { max-width: 1500px !important; margin: 0 auto }
.curves { display: flex; gap: 1rem; flex-wrap: wrap } .curves > div { flex: 1 1 240px; max-width: 460px } .curves svg { width: 100% }
.curves svg text { font-family: system-ui, sans-serif }
.hint { color: var(--muted); font-size: 0.9rem }
footer { display: none !important }
"""


def add_page(app: FastAPI, engine: Any, model: Model) -> FastAPI:
    """The app with the page at /. Sliders are those of the adapters that are loaded now."""
    fonts: Any = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # the default ones are fetched
    theme = Soft(primary_hue="cyan", neutral_hue="slate", **fonts)
    return gr.mount_gradio_app(app, make_page(engine, model), "/", theme=theme, css=CSS, ssr_mode=False, show_error=True, run_history=False)


def make_page(engine: Any, model: Model) -> gr.Blocks:
    """The page as Gradio blocks."""
    desk, names = _Desk(engine, model), sorted(engine.adapters)
    with gr.Blocks(title=f"meetjax: {model.name}", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(f"## {model.name}\nMove a dial and ask. 0 is the base model, 1 the adapter as trained; beyond and below are allowed.")
        turns = gr.State([])
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                sliders = [_slider(engine, name) for name in names]
                dial = gr.Slider(LOWEST, HIGHEST, 1.0, step=0.05, label="logit dial (1: off)", elem_id="dial")
                with gr.Accordion("sampling", open=False):
                    temperature = gr.Slider(0, 2, 0, step=0.05, label="temperature, 0: the likeliest token")
                    limit = gr.Slider(8, min(512, engine.capacity), min(160, engine.capacity // 2), step=8, label="new tokens, at most")
                    seed = gr.Number(0, label="seed", precision=0, minimum=0)
            with gr.Column(scale=3):
                chat = gr.Chatbot(height=380, show_label=False, buttons=["copy"], feedback_options=None, elem_id="chat")
                with gr.Row(equal_height=True):
                    box = gr.Textbox(
                        placeholder="Ask something", show_label=False, scale=8, autofocus=True, container=False, elem_id="message"
                    )
                    send = gr.Button("Send", variant="primary", scale=1, min_width=80, elem_id="send")
                    stop = gr.Button("Stop", scale=1, min_width=80)
        settings = [dial, temperature, limit, seed, *sliders]
        gr.Markdown("### The same prompt along one dial")
        with gr.Row(equal_height=True):
            which = gr.Dropdown(names, value=names[0] if names else None, show_label=False, container=False, scale=2, min_width=160)
            at = [
                gr.Number(value, show_label=False, container=False, step=0.1, minimum=-10, maximum=10, min_width=80, elem_id=f"at{i}")
                for i, value in enumerate(THREE)
            ]
            compare = gr.Button("Compare", scale=1, min_width=100, elem_id="compare")
        with gr.Row():
            with gr.Column(scale=1), gr.Row():
                sides = [
                    gr.Textbox(label=f"at {value:g}", lines=10, max_lines=10, elem_id=f"side{i}", min_width=150)
                    for i, value in enumerate(THREE)
                ]
            with gr.Column(scale=1, min_width=300):
                curve = gr.HTML(_hint("Length and log-ratio against strength are drawn here."), elem_id="curve")
        with gr.Accordion("the same request as code", open=False), gr.Row():
            curl = gr.Code(language="shell", label="curl", interactive=False, elem_id="curl")
            python = gr.Code(language="python", label="Python", interactive=False, elem_id="python")

        quiet: Any = {"show_progress": "hidden"}
        again: Any = quiet | {"trigger_mode": "always_last"}  # asked for while it runs, it runs once more; else the wish would be lost
        said = gr.on((box.submit, send.click), desk.say, [box, turns], [box, turns, chat], **quiet)
        said.success(desk.code, [turns, *settings], [curl, python], **again)
        answered = said.success(desk.chat, [turns, *settings], [turns, chat], **quiet)
        running: list[Any] = [answered]
        for when in (answered.success, compare.click):
            running.append(when(desk.compare, [turns, which, *at, *settings], sides, **again))
            running.append(when(desk.draw, [turns, which, *settings], curve, **again))
        stop.click(None, cancels=running)
        chat.clear(lambda: ([], []), None, [turns, chat], cancels=running)
        for part in settings:
            part.change(desk.code, [turns, *settings], [curl, python], **again)
        page.load(desk.code, [turns, *settings], [curl, python], **quiet)
    return page.queue(default_concurrency_limit=16, max_size=64)


def _slider(engine: Any, name: str) -> gr.Slider:
    info = engine.adapters[name]
    lowest = 0.0 if "prompt" in info.kinds else LOWEST  # a soft prompt has no weight below 0: the logit dial has
    label = f"{name} ({' + '.join(info.kinds)})"
    return gr.Slider(lowest, HIGHEST, 0.0, step=0.05, label=label, elem_id=f"adapter-{name}")


def _hint(text: str) -> str:
    return f'<p class="hint">{escape(text)}</p>'


class _Desk:
    """What happens when something on the page is pressed. settings: dial, temperature, limit, seed, then a strength an adapter."""

    def __init__(self, engine: Any, model: Model):
        self.engine, self.model, self.names = engine, model, sorted(engine.adapters)

    def say(self, message: str, turns: Turns):
        if not message.strip():
            raise gr.Error("Type a message first.", duration=3)
        turns = [*turns, {"role": "user", "content": message}]
        return "", turns, turns

    def chat(self, turns: Turns, *settings: float) -> Iterator[tuple[Turns, Turns]]:
        """The conversation with the answer so far."""
        try:
            stream = self.engine.submit(self._ask(turns, settings))
        except (MeetjaxError, QueueFull) as error:
            raise gr.Error(str(error)) from None
        text = ""
        try:
            for piece in stream:
                text += piece.text
                if piece.finish in ("error", "cancelled"):
                    raise gr.Error(stream.error or "the server ended it")
                if piece.text or piece.finish:
                    now = [*turns, {"role": "assistant", "content": text}]
                    yield now, now
        finally:
            give_up([stream])

    def compare(self, turns: Turns, name: str | None, first: float, second: float, third: float, *settings: float) -> Iterator[list[Any]]:
        """Three answers to the last prompt, while they are made."""
        strengths = tuple(float(strength or 0.0) for strength in (first, second, third))  # an emptied box is None
        asked, found = self._last(turns, name)
        asks = along(self._ask(asked, settings), found, strengths)
        for trials in run(self.engine, asks, strengths):
            yield [gr.Textbox(t.error or t.text, label=_heading(t)) for t in trials]

    def draw(self, turns: Turns, name: str | None, *settings: float) -> Iterator[str]:
        """Length and log-ratio against strength for the last prompt, greedy, a point as soon as its answer is whole."""
        asked, found = self._last(turns, name)
        strengths = [s for s in CURVE if s >= 0 or "prompt" not in self.engine.adapters[found].kinds]
        dial, _, limit, _, *gates = settings
        ask = self._ask(asked, (dial, 0.0, min(limit, CURVE_TOKENS), 0, *gates))
        ratios: dict[float, float] = {}
        yield _hint("drawing the curve of this prompt")
        for trials in run(self.engine, along(ask, found, strengths), strengths):
            whole = [trial for trial in trials if trial.finish is not None and trial.error is None]
            new = [trial for trial in whole if trial.strength not in ratios]
            ratios |= {trial.strength: log_ratio(self.model, ask.ids, trial) for trial in new}
            if new:
                yield _curves(found, whole, ratios)
        if not ratios:
            yield _hint(next((trial.error for trial in trials if trial.error), "nothing to draw"))

    def code(self, turns: Turns, request: gr.Request, *settings: float) -> tuple[str, str]:
        """The request of the last prompt under these settings, for curl and for the openai client."""
        return snippets(_base_url(request), self._body(turns, settings))

    def _strengths(self, settings: tuple[float, ...]) -> dict[str, float]:
        return {name: strength for name, strength in zip(self.names, settings[4:], strict=True) if strength}

    def _ask(self, turns: Turns, settings: tuple[float, ...]) -> Ask:
        dial, temperature, limit, seed = settings[:4]
        messages = tuple(Message(turn["role"], turn["content"]) for turn in turns)
        ids = tuple(encode_prompt(self.model.tokenizer, messages if self.model.tokenizer.chat_template else messages[-1].content))
        limit = max(1, min(int(limit), self.engine.capacity - len(ids)))
        return Ask(ids, self._strengths(settings), None if dial == 1 else float(dial), Sampling(float(temperature)), int(seed or 0), limit)

    def _body(self, turns: Turns, settings: tuple[float, ...]) -> dict[str, Any]:
        dial, temperature, limit, seed = settings[:4]
        asked = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
        messages = [{"role": turn["role"], "content": turn["content"]} for turn in asked] or [{"role": "user", "content": "Hello"}]
        body = {"model": "base", "messages": messages, "max_tokens": int(limit), "temperature": temperature}
        body |= {"seed": int(seed or 0)} if temperature else {}
        body |= {"adapters": strengths} if (strengths := self._strengths(settings)) else {}
        return body | ({} if dial == 1 else {"logit_dial": dial})

    def _last(self, turns: Turns, name: str | None) -> tuple[Turns, str]:
        """The conversation up to its last question, and an adapter that is loaded."""
        asked = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
        if not asked:
            raise gr.Error("Ask something first.", duration=3)
        if name is None or name not in self.engine.adapters:
            raise gr.Error("No adapter is loaded: meetjax serve --adapter NAME=DIR", duration=5)
        return asked, name


def _heading(trial: Trial) -> str:
    ended = "" if trial.finish is None or trial.error else f" · {len(trial.ids)} tokens"
    return f"at {trial.strength:g}{ended}"


def _curves(name: str, trials: list[Trial], ratios: dict[float, float]) -> str:
    """Two small plots as one piece of HTML."""
    strengths = [trial.strength for trial in trials]
    lengths = against_strength({name: (strengths, [len(trial.ids) for trial in trials])}, "length of the answer, tokens")
    rewards = against_strength({name: (strengths, [ratios[s] for s in strengths])}, "log-ratio to the base, nats")
    plots = (to_svg(lengths, "length", f"length against the strength of {name}"), to_svg(rewards, "ratio", f"log-ratio against {name}"))
    return '<div class="curves">' + "".join(f"<div>{plot}</div>" for plot in plots) + "</div>"


def _base_url(request: gr.Request) -> str:
    return f"http://{request.headers.get('host', 'localhost:8000')}/v1"


def snippets(url: str, body: dict[str, Any]) -> tuple[str, str]:
    """A request to `url` as a curl command and as Python for the openai client."""
    curl = (
        f"curl {url}/chat/completions \\\n"
        '  -H "Authorization: Bearer $MEETJAX_API_KEY" -H "Content-Type: application/json" \\\n'
        f"  -d {shlex.quote(json.dumps(body, ensure_ascii=False, indent=2))}"
    )
    extra = {name: body[name] for name in ("adapters", "logit_dial") if name in body}
    options = {name: value for name, value in body.items() if name not in extra} | ({"extra_body": extra} if extra else {})
    lines = "".join(f"    {name}={value!r},\n" for name, value in options.items())
    python = (
        "import os\n\nfrom openai import OpenAI\n\n"
        f'client = OpenAI(base_url="{url}", api_key=os.environ.get("MEETJAX_API_KEY", "none"))\n'
        f"reply = client.chat.completions.create(\n{lines})\nprint(reply.choices[0].message.content)\n"
    )
    return curl, python
