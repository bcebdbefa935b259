"""From a prompt to the text that stands before the answer."""

from __future__ import annotations

from typing import Literal

import jinja2

from meetjax.data.records import Message, Prompt
from meetjax.errors import MeetjaxError
from meetjax.types import Tokenizer

TEMPLATES = ("auto", "chat", "none")


class TemplateRefusal(MeetjaxError):
    """The chat template raised on this prompt (for example: two turns of one role in a row)."""


def check_template(tokenizer: Tokenizer, template: str) -> None:
    """Raises MeetjaxError when `template` is unknown, or is "chat" and the tokenizer has no chat template."""
    if template not in TEMPLATES:
        raise MeetjaxError("template", expected=" or ".join(TEMPLATES), found=repr(template))
    if template == "chat" and not tokenizer.chat_template:
        raise MeetjaxError(
            "template 'chat'",
            expected="a tokenizer with a chat template",
            found="none",
            fix="use template 'none' or set tokenizer.chat_template",
        )


def render_prompt(tokenizer: Tokenizer, prompt: Prompt, template: Literal["auto", "chat", "none"] = "auto") -> str:
    """The text before the answer.

    Conversations go through the tokenizer's chat template, opened for the assistant's turn. Plain text stays as it is under
    "none", becomes one user message under "chat", and under "auto" does so when the tokenizer has a chat template.
    Raises MeetjaxError when a conversation meets no chat template or "none", and TemplateRefusal when the template raises.
    """
    check_template(tokenizer, template)
    if isinstance(prompt, str):
        if template == "none" or not tokenizer.chat_template:
            return prompt
        prompt = (Message("user", prompt),)
    elif template == "none" or not tokenizer.chat_template:
        raise MeetjaxError(
            f"a conversation of {len(prompt)} messages",
            expected="a chat template",
            found="template 'none'" if template == "none" else "a tokenizer without one",
            fix="use template 'auto' and set tokenizer.chat_template",
        )
    messages = [{"role": message.role, "content": message.content} for message in prompt]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        roles = " ".join(message.role for message in prompt)
        raise TemplateRefusal("the chat template refuses a prompt", expected="roles that it accepts", found=f"{roles}: {error}") from error
