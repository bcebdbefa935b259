"""Greedy generation of SmolLM2 for twenty prompts: token for token what transformers generates."""

from __future__ import annotations

import numpy as np
import torch

from meetjax.data.template import render_prompt
from meetjax.generate.requests import Request, generate_texts

NEW = 32
PROMPTS = (
    "What is the capital of France?", "Say yes.", "Name three colours.", "Write a haiku about rain.", "What is 17 + 25?",
    "Explain photosynthesis to a child.", "Translate 'good morning' into Spanish.", "Who wrote Hamlet?", "List the planets.",
    "How do I boil an egg? I have a pot, a stove, some salt, and a dozen eggs straight from the fridge.", "Tell me a joke.",
    "Why is the sky blue?", "Give me a name for a cat.", "What does HTTP 404 mean?", "Complete: roses are red,", "What is DNA?",
    "Write a Python function that adds two numbers.", "Is water wet? Answer with one word.", "Ça va? Réponds en français. 😀", "Hello!",
)  # fmt: skip


def test_greedy_parity(smollm2, torch_smollm2):
    tokenizer = smollm2.tokenizer
    ids = [tokenizer(render_prompt(tokenizer, prompt), add_special_tokens=False)["input_ids"] for prompt in PROMPTS]
    width = max(len(row) for row in ids)
    tokens = np.array([[0] * (width - len(row)) + row for row in ids])
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    with torch.no_grad():
        out = torch_smollm2().generate(
            torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask), do_sample=False, max_new_tokens=NEW, pad_token_id=0
        )
    found = generate_texts(smollm2, [Request(prompt) for prompt in PROMPTS], max_new_tokens=NEW)
    assert len(PROMPTS) == 20
    for prompt, expected, completion in zip(PROMPTS, out[:, width:].tolist(), found, strict=True):
        ends = [i for i, token in enumerate(expected) if token in smollm2.config.eos_token_ids]
        assert list(completion.ids) == (expected[: ends[0] + 1] if ends else expected), prompt
        assert completion.ended == bool(ends)
    # Both ways to stop must have been seen.
    assert {completion.ended for completion in found} == {True, False}
