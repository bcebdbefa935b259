"""A conversation in the terminal: answers change with the dials, and a mistake costs one line."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from meetjax.adapters.io import save_adapters
from meetjax.chat import Chat, named_folders, talk
from meetjax.data.records import Message
from meetjax.errors import MeetjaxError
from meetjax.generate.requests import Request, generate_texts
from meetjax.generate.sampling import Sampling
from tests.conftest import random_bank, take

NEW = 8


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):
    """Two adapters of the tiny model: an edit and a soft prompt."""
    folder = tmp_path_factory.mktemp("adapters")
    banks = {"brief": take(random_bank(model.config, ("edit",)), 0), "soft": take(random_bank(model.config, ("prompt",)), 0)}
    return {name: save_adapters(folder / name, bank, base="tiny", fingerprint=model.fingerprint) for name, bank in banks.items()}


@pytest.fixture
def chat(model, folders):
    return Chat(model, folders, sampling=Sampling(), seed=0, max_new_tokens=NEW)


def test_controls_stand_apart_and_the_last_one_is_on(model, tmp_path):
    """MEET's bad and good control never act at once unless asked to."""
    bank = random_bank(model.config, ("prompt",))
    chat = Chat(
        model, {"meet": save_adapters(tmp_path / "meet", bank, base="tiny", fingerprint=model.fingerprint)},
        sampling=Sampling(), seed=0, max_new_tokens=NEW,
    )  # fmt: skip
    assert chat.strengths == {"meet.0": 0.0, "meet.1": 1.0}
    request = Request((Message("user", "hello"),), gates=(0.0, 1.0))
    assert "".join(chat.answer("hello")) == generate_texts(model, [request], adapters=bank, max_new_tokens=NEW)[0].text


def say(chat, *lines):
    """What `talk` prints for these lines, from the greeting on."""
    told, given = io.StringIO(), iter(lines)

    def read(prompt):
        told.write("\n" + prompt)
        try:
            return next(given)
        except StopIteration:
            raise EOFError from None

    talk(chat, Console(file=told, width=200), read)
    return [part.strip("\n") for part in told.getvalue().split("\n> ")]


def test_answers_follow_the_dials(chat, model):
    """At 0 the base answers, as `generate_texts` has it, at another strength something else."""
    _, _, _, base, _, _, brief, *_ = say(chat, "/set brief 0", "/set soft 0", "hello", "/reset", "/set brief 1.5", "hello")
    request = Request((Message("user", "hello"),))
    assert base == generate_texts(model, [request], max_new_tokens=NEW)[0].text
    assert brief != base


def test_the_conversation_is_remembered_until_reset(chat):
    first, again = (list(chat.answer("hello")) for _ in range(2))
    assert [message.role for message in chat.said] == ["user", "assistant", "user", "assistant"]
    assert chat.command("/reset") == "forgotten" and chat.said == []
    assert list(chat.answer("hello")) == first != again
    chat.command("/reset")
    assert chat.command("/system the mat") == "system message set"
    assert list(chat.answer("hello")) != first


def test_the_logit_dial(chat):
    chat.command("/dial 0")
    mixed = list(chat.answer("hello"))
    chat.command("/reset")
    chat.command("/dial off")
    chat.command("/set brief 0")
    chat.command("/set soft 0")
    assert list(chat.answer("hello")) == mixed


MISTAKES = {
    "/set nobody 1": "error: /set; expected NAME STRENGTH, a name of brief, soft; found nobody 1",
    "/set brief": "error: /set; expected NAME STRENGTH",
    "/set brief much": "error: /set; expected a finite number; found much",
    "/set soft -1": "error: gates: value of a soft prompt; expected >= 0",
    "/dial nan": "error: /dial; expected a finite number; found nan",
    "/sing": "error: /sing: no such command; expected /set, /dial, /adapters, /system, /reset, /help, /quit",
    "zqxj " * 60: "error: prompt: too long",
}


def test_a_mistake_costs_one_line_and_changes_nothing(chat):
    greeting, *told, _ = say(chat, *MISTAKES)
    for line, expected in zip(told, MISTAKES.values(), strict=True):
        assert line.startswith(expected) and "\n" not in line
    assert chat.command("/adapters") == greeting.split("\n", 1)[1].strip("\n")
    assert chat.said == []


def test_an_answer_can_be_stopped(chat):
    """Ctrl-C keeps what has come and goes on."""
    whole = chat.answer

    def stopped(text):
        for i, piece in enumerate(whole(text)):
            if i == 2:
                raise KeyboardInterrupt
            yield piece

    chat.answer = stopped
    _, cut, helped, _ = say(chat, "hello", "/help")
    assert cut.endswith("(stopped)") and "/quit" in helped
    assert len(chat.said) == 2


def test_adapters_are_named():
    assert named_folders(("a=x", "b=y=z")) == {"a": Path("x"), "b": Path("y=z")}
    for pairs in (("x",), ("=x",), ("a=",), ("a=x", "a=y"), ("a b=x",)):
        with pytest.raises(MeetjaxError, match="expected NAME=DIR"):
            named_folders(pairs)


def test_chat_as_a_user_runs_it(model_folder, folders):
    """In a process of its own, lines on standard input."""
    command = [sys.executable, "-m", "meetjax.cli", "chat", "--model", model_folder, "--max-new-tokens", "4"]
    for name, folder in folders.items():
        command += ["--adapter", f"{name}={folder}"]
    lines = "hello\n/set brief x\n/set brief 1.5\nhello\n"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(command, input=lines, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("tiny. /help says")
    assert "error: /set; expected a finite number; found x" in done.stdout
    assert "brief: 1.5  (edit, " in done.stdout
    assert np.count_nonzero([line.startswith("> ") for line in done.stdout.splitlines()]) == 5
