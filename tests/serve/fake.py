"""An engine without a model: the same interface, answers that depend on the ask alone, and a hand on its pace."""

from __future__ import annotations

import threading
import zlib
from collections import deque
from pathlib import Path

import numpy as np

from meetjax.errors import MeetjaxError
from meetjax.serve.engine import Stats
from meetjax.serve.room import AdapterInfo
from meetjax.serve.stream import Ask, Piece, QueueFull, Stream

WORDS = ("the", " cat", " sat", " on", " the", " mat", " hello", " there", ",", " how", " are", " you", "?", " long", " short", " é", " 🎈")


class FakeEngine:
    """Answers every ask with words drawn from its content; `going.clear()` holds all answers, `pace` is seconds a token."""

    def __init__(self, model, *, slots=4, capacity=256, queue=8, pace=0.0):
        self.model, self.slots, self.capacity, self.queue, self.pace = model, slots, capacity, queue, pace
        self.adapters = {
            "concise": AdapterInfo(("lora",), 100, Path("concise")),
            "harmless": AdapterInfo(("edit",), 100, Path("harmless")),
            "polite": AdapterInfo(("prompt",), 100, Path("polite")),
        }
        self.going = threading.Event()
        self.going.set()
        self.broken = False
        self.asked: list[Ask] = []
        self.done = self.failed = self.cancelled = self.tokens = 0
        self._waiting: deque[tuple[Stream, deque[Piece]]] = deque()
        self._active: list[tuple[Stream, deque[Piece]]] = []
        self.refusing, self._closed = "", False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, ask):
        if self.refusing:
            raise MeetjaxError(f"engine: {self.refusing}")
        for name, strength in ask.adapters.items():
            if name not in self.adapters:
                raise MeetjaxError(f"no adapter {name}")
            if "prompt" in self.adapters[name].kinds and strength < 0:
                raise MeetjaxError(f"{name}: strength of a soft prompt", expected=">= 0", found=strength)
        if len(self._waiting) + len(self._active) >= self.queue + self.slots:
            raise QueueFull(len(self._waiting), 2.0)
        self.asked.append(ask)
        stream = Stream(ask)
        self._waiting.append((stream, deque(self.pieces(ask))))
        return stream

    def pieces(self, ask):
        """All pieces of the answer to an ask."""
        settings = (ask.ids, sorted(ask.adapters.items()), ask.dial, ask.seed if ask.sampling.temperature else None)
        draw = np.random.default_rng(zlib.crc32(repr(settings).encode()))
        strength = sum(ask.adapters.values()) * (1.0 if ask.dial is None else ask.dial)
        words = "".join(draw.choice(WORDS, max(2, int(14 - 6 * strength))))
        cut = min((at for text in ask.stop if (at := words.find(text)) >= 0), default=len(words))
        stopped, words = cut < len(words), words[:cut]
        tokens = self.model.tokenizer(words, add_special_tokens=False)["input_ids"][: ask.max_new_tokens]
        pieces, said = [], ""
        for i, token in enumerate(tokens):
            text = self.model.tokenizer.decode(tokens[: i + 1])
            new = "" if text.endswith("\ufffd") else text[len(said) :]
            said += new
            top = tuple((int((token + k) % 300), -0.5 - k) for k in range(ask.logprobs))
            pieces.append(Piece(new, token, -0.5 if ask.logprobs else None, top))
        if stopped or len(tokens) < ask.max_new_tokens:
            pieces.append(Piece("", self.model.config.eos_token_ids[0], -0.1 if ask.logprobs else None, (), "stop"))
        else:
            last = pieces.pop()
            pieces.append(Piece(last.text, last.token, last.logprob, last.top, "length"))
        return pieces

    def text(self, ask):
        """The whole answer to an ask."""
        return "".join(piece.text for piece in self.pieces(ask))

    def _run(self):
        step = threading.Event()
        while not self._closed:
            self.going.wait()
            step.wait(self.pace or 0.001)
            while self._waiting and len(self._active) < self.slots:
                self._active.append(self._waiting.popleft())
            for item in list(self._active):
                stream, pieces = item
                if self.broken:
                    stream.fail("the device is lost")
                    self.failed += 1
                elif stream.cancelled:
                    stream.put(Piece("", finish="cancelled"))
                    self.cancelled += 1
                else:
                    stream.put(pieces.popleft())
                    self.tokens += 1
                    self.done += stream.finished
                if stream.finished:
                    self._active.remove(item)

    def stats(self):
        return Stats(
            self.slots, len(self._active), len(self._waiting), self.done, self.failed, self.cancelled, self.tokens, 0, 0, 0, 0, self.pace
        )

    def idle(self):
        """Whether nothing is asked of it."""
        return not self._active and not self._waiting

    def drain(self, seconds):
        self.refusing = "the engine is shutting down"
        waited = threading.Event()
        for _ in range(int(seconds / 0.01)):
            if self.idle():
                return
            waited.wait(0.01)

    def close(self):
        self.refusing, self._closed = "the engine is shutting down", True
        self.going.set()
        self._thread.join()
        for stream, _ in (*self._active, *self._waiting):
            stream.fail("the server is shutting down")
        self._active.clear()
        self._waiting.clear()
