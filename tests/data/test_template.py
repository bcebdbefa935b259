"""What stands before the answer, for both kinds of prompt under every template mode."""

from __future__ import annotations

import pytest

from meetjax.data.records import Message
from meetjax.data.template import TemplateRefusal, render_prompt
from meetjax.errors import MeetjaxError

TALK = (Message("system", "Be brief."), Message("user", "Hello"))
RENDERED = "<|start|>user\nHello<|end|>\n<|start|>assistant\n"


def test_plain_text(tokenizer, plain_tokenizer):
    assert render_prompt(tokenizer, "Hello", "auto") == render_prompt(tokenizer, "Hello", "chat") == RENDERED
    assert render_prompt(tokenizer, "Hello", "none") == "Hello"
    assert render_prompt(plain_tokenizer, "Hello", "auto") == render_prompt(plain_tokenizer, "Hello", "none") == "Hello"


@pytest.mark.parametrize("template", ["auto", "chat"])
def test_conversation(tokenizer, template):
    assert render_prompt(tokenizer, TALK, template) == "<|start|>system\nBe brief.<|end|>\n" + RENDERED


def test_errors(tokenizer, plain_tokenizer):
    with pytest.raises(MeetjaxError, match="a conversation of 2 messages; expected a chat template; found a tokenizer without one"):
        render_prompt(plain_tokenizer, TALK)
    with pytest.raises(MeetjaxError, match="found template 'none'"):
        render_prompt(tokenizer, TALK, "none")
    with pytest.raises(MeetjaxError, match="template 'chat'"):
        render_prompt(plain_tokenizer, "Hello", "chat")
    with pytest.raises(MeetjaxError, match="found 'chatml'"):
        render_prompt(tokenizer, "Hello", "chatml")
    with pytest.raises(TemplateRefusal, match="found user user: roles must alternate"):
        render_prompt(tokenizer, (Message("user", "a"), Message("user", "b")))
