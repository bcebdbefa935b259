"""How far a model moves on its own answers: nothing for the base itself, and what the log-probabilities say."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from meetjax.evaluate.drift import drift
from meetjax.generate.requests import Request, generate_texts
from meetjax.generate.sampling import Sampling
from meetjax.models.decoder import apply
from tests.conftest import random_bank

PROMPTS = ["the cat?", "a mat?", "who is the user?"]


def test_base_has_not_moved(model):
    found = drift(model, model, None, PROMPTS, max_new_tokens=8)
    assert found["kl"] == 0.0 and found["kl_interval"] == [0.0, 0.0] and 1 <= found["mean_tokens"] <= 8
    closed = drift(model, model, random_bank(model.config, ("lora",), entries=(0,)), PROMPTS, gates=(0.0,), max_new_tokens=8)
    assert closed == found


def test_drift_asks_as_the_recipe_does(model):
    """Without the template the same prompts are other texts, and so are the answers."""
    bank = random_bank(model.config, ("lora",), entries=(0,))
    chat, plain = (drift(model, model, bank, PROMPTS, template=template, max_new_tokens=8) for template in ("auto", "none"))
    assert chat != plain


def test_drift_is_the_divergence_along_the_answers(model):
    """Adapters, and a base of its own: the sum over each sampled answer, by dense softmax."""
    bank = random_bank(model.config, ("lora", "edit"), entries=(0,))
    other = dataclasses.replace(model, params=jax.tree.map(lambda leaf: leaf * 1.05, model.params))
    for policy, adapters in ((model, bank), (other, None)):
        found = drift(policy, model, adapters, PROMPTS, max_new_tokens=6, seed=3)
        requests = [Request(p, sampling=Sampling(temperature=1.0), seed=3 + i) for i, p in enumerate(PROMPTS)]
        expected = []
        for answer in generate_texts(policy, requests, adapters=adapters, max_new_tokens=6):
            tokens = np.array([[*answer.prompt, *answer.ids]], np.int32)
            log_p, log_q = (
                np.asarray(jax.nn.log_softmax(apply(model.config, params, tokens, own)))[0, len(answer.prompt) - 1 : -1]
                for params, own in ((policy.params, adapters), (model.params, None))
            )
            expected.append((np.exp(log_p) * (log_p - log_q)).sum())
        np.testing.assert_allclose(found["kl"], np.mean(expected), rtol=1e-4)
        assert found["kl_interval"][0] <= found["kl"] <= found["kl_interval"][1] and found["kl"] > 0.01
