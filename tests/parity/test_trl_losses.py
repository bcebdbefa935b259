"""DPO and SFT against trl's own trainers on peft's own LoRA: tokens, loss, metrics and every adapter gradient of one real batch."""

from __future__ import annotations

import copy
import dataclasses
import math
from types import SimpleNamespace

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import trl

from meetjax.adapters.peft import lora_to_peft
from meetjax.adapters.tree import Bank
from meetjax.data.loader import Plan, pad_batch
from meetjax.data.records import Completion
from meetjax.data.template import render_prompt
from meetjax.data.tokenize import answer_ids, laid_lengths, tokenize_records
from meetjax.objectives.logps import compiled_answer_logps
from meetjax.objectives.preference import Dpo, dpo_loss
from meetjax.objectives.sft import Sft
from meetjax.train.step import make_gradient, partition

LOSS_ERROR = 1e-4
"""Nats. A DPO margin is a difference of sums of hundreds of log-probabilities, each rounded at 1e-6 of its size."""
LOGP_ERROR = 1e-5
"""Of a summed log-probability of some 100 nats: float32 through 30 layers."""
GRADIENT_ERROR = 1e-4
"""Of the norm of the gradient of one matrix: float32 through 30 layers there and back."""
FORMULA_ERROR = 1e-6
"""The loss on given log-probabilities: a handful of float32 operations."""
TRAINED = 1e-2
"""The adapted model must be this far from the base, in nats, or equal losses would mean nothing."""
BETA = 0.1
COMMON = {
    "use_cpu": True, "bf16": False, "activation_checkpointing": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
    "per_device_train_batch_size": 4, "max_length": None, "dataloader_pin_memory": False,
}  # fmt: skip


def texts(records, tokenizer):
    """The rows of a trl dataset: the prompt as it is rendered here, the answers as they stand (trl adds EOS, as meetjax does)."""
    fields = [field.name for field in dataclasses.fields(records[0]) if field.name not in ("prompt", "where")]
    rows = [{"prompt": render_prompt(tokenizer, r.prompt)} | {name: getattr(r, name) for name in fields} for r in records]
    return datasets.Dataset.from_list(rows)


def set_lora(model, lora):
    """Puts our LoRA into a peft model."""
    state = {name: torch.from_numpy(leaf) for name, leaf in lora_to_peft(lora).items()}
    outcome = peft.set_peft_model_state_dict(model, state)
    assert not outcome.unexpected_keys


def whole_batch(rows):
    """All rows as one batch, padded to the longest."""
    return pad_batch(rows, Plan(int(laid_lengths(rows).max()), np.arange(len(rows)), len(rows)))[0]


def their_gradients(model):
    """Gradients by PEFT's state-dict name, then forgotten."""
    found = {name.replace(".default", ""): leaf.grad.numpy() for name, leaf in model.named_parameters() if leaf.requires_grad}
    model.zero_grad(set_to_none=True)
    return found


def assert_gradients_equal(ours, theirs):
    """Every lora_A and lora_B, relative to the norm of its own gradient."""
    ours = lora_to_peft(ours)
    assert ours.keys() == theirs.keys()
    assert all(np.linalg.norm(leaf) > 0 for leaf in theirs.values())
    errors = {name: np.linalg.norm(ours[name] - leaf) / np.linalg.norm(leaf) for name, leaf in theirs.items()}
    worst = max(errors, key=errors.get)
    assert errors[worst] <= GRADIENT_ERROR, worst


def their_metrics(trainer):
    """What trl logged of the one batch it has seen."""
    found = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    trainer._metrics["train"].clear()
    return found


@pytest.fixture(scope="module")
def lora(smollm2, random_lora):
    return random_lora(smollm2.config)


@pytest.fixture(scope="module")
def dpo_trainer(smollm2, torch_smollm2, pairs, lora, peft_config, tmp_path_factory):
    """trl's DPOTrainer on SmolLM2 with our LoRA; its reference is the same model with the adapter disabled."""
    arguments = trl.DPOConfig(output_dir=str(tmp_path_factory.mktemp("dpo")), beta=BETA, **COMMON)
    trainer = trl.DPOTrainer(
        torch_smollm2(), args=arguments, train_dataset=texts(pairs[0], smollm2.tokenizer),
        processing_class=copy.deepcopy(smollm2.tokenizer), peft_config=peft_config(),
    )  # fmt: skip
    set_lora(trainer.model, lora)
    trainer.model.train()
    return trainer


def test_dpo_loss_and_gradient_parity(smollm2, pairs, lora, dpo_trainer):
    _, rows = pairs
    examples = list(dpo_trainer.train_dataset)
    for n, example in enumerate(examples):
        for c, answer in enumerate(("chosen_ids", "rejected_ids")):
            assert example["prompt_ids"] + example[answer] == answer_ids(rows, n, c).tolist()
            assert len(example["prompt_ids"]) == rows.starts[n, c]
    loss = dpo_trainer.compute_loss(dpo_trainer.model, dpo_trainer.data_collator(examples))
    loss.backward()
    theirs, expected = their_gradients(dpo_trainer.model), their_metrics(dpo_trainer)

    batch = whole_batch(rows)
    batch = dataclasses.replace(batch, ref_logps=np.asarray(compiled_answer_logps(smollm2.config, smollm2.params, None, batch)))
    trainable, frozen = partition(smollm2.params, Bank(lora=lora), kinds=("lora",), base=False)
    gradient, found = jax.jit(make_gradient(smollm2.config, Dpo(beta=BETA)))(trainable, frozen, batch)

    assert abs(loss.item() - math.log(2)) > TRAINED
    assert abs(float(found["loss"]) - loss.item()) <= LOSS_ERROR
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert abs(float(found[name]) - expected[name]) <= LOSS_ERROR, name
    for name in ("logps/chosen", "logps/rejected"):
        assert abs(float(found[name]) - expected[name]) <= LOGP_ERROR * abs(expected[name]), name
    assert_gradients_equal(gradient.adapters.lora, theirs)


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
def test_dpo_formula_parity(dpo_trainer, beta, monkeypatch):
    """trl's sigmoid loss and its gradient on random log-probabilities instead of a model's, margins of both signs and large."""
    monkeypatch.setattr(dpo_trainer, "beta", beta)
    monkeypatch.setattr(dpo_trainer, "precompute_ref_logps", True)
    draw, count, length = np.random.default_rng(11), 6, 9
    logps, ref_logps = (draw.normal(-40, 20, (count, 2)).astype(np.float32) for _ in range(2))
    # One answer token a row carries the whole sum; the rest is prompt, which the model reports as zero.
    scores = torch.zeros(2 * count, length - 1)
    scores[:, -1] = torch.from_numpy(logps.T.reshape(-1))
    scores.requires_grad_()
    mask = torch.zeros(2 * count, length, dtype=torch.long)
    mask[:, -1] = 1
    ids = torch.ones(2 * count, length, dtype=torch.long)
    outputs = SimpleNamespace(
        log_probs=scores, entropy=torch.zeros_like(scores), mean_logits=torch.zeros_like(scores), is_top1=scores.detach() > 0
    )
    inputs = {"input_ids": ids, "attention_mask": ids, "completion_mask": mask}
    inputs |= {"ref_chosen_logps": torch.from_numpy(ref_logps[:, 0]), "ref_rejected_logps": torch.from_numpy(ref_logps[:, 1])}
    loss = dpo_trainer.compute_loss(lambda **_: outputs, inputs)
    loss.backward()
    theirs = scores.grad[:, -1].numpy().reshape(2, count).T

    found, gradient = jax.value_and_grad(lambda s: jnp.mean(dpo_loss(s, ref_logps, beta)[0]))(jnp.asarray(logps))
    assert abs(float(found) - loss.item()) <= FORMULA_ERROR * max(1.0, abs(loss.item()))
    np.testing.assert_allclose(gradient, theirs, rtol=0, atol=FORMULA_ERROR * np.abs(theirs).max())
    margins = (logps - ref_logps)[:, 0] - (logps - ref_logps)[:, 1]
    assert margins.min() < 0 < margins.max()
    assert their_metrics(dpo_trainer)["rewards/accuracies"] == pytest.approx((margins > 0).mean())


def test_sft_loss_and_gradient_parity(smollm2, torch_smollm2, pairs, lora, peft_config, tmp_path):
    """The mean over all answer tokens of the batch (not the mean of the rows' means), prompts masked."""
    records = [Completion(pair.prompt, pair.chosen, pair.where) for pair in pairs[0]]
    rows, _ = tokenize_records(records, smollm2.tokenizer, 4096)
    trainer = trl.SFTTrainer(
        torch_smollm2(), args=trl.SFTConfig(output_dir=str(tmp_path), completion_only_loss=True, **COMMON),
        train_dataset=texts(records, smollm2.tokenizer), processing_class=copy.deepcopy(smollm2.tokenizer), peft_config=peft_config(),
    )  # fmt: skip
    set_lora(trainer.model, lora)
    trainer.model.train()
    examples = list(trainer.train_dataset)
    for n, example in enumerate(examples):
        ids, start = answer_ids(rows, n, 0).tolist(), int(rows.starts[n, 0])
        assert example["input_ids"] == ids
        assert example["labels"] == [-100] * start + ids[start:]
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
    loss.backward()
    theirs = their_gradients(trainer.model)

    batch = whole_batch(rows)
    trainable, frozen = partition(smollm2.params, Bank(lora=lora), kinds=("lora",), base=False)
    gradient, found = jax.jit(make_gradient(smollm2.config, Sft()))(trainable, frozen, batch)
    answer_tokens = (rows.lengths - rows.starts)[:, 0]
    base_loss = -np.asarray(compiled_answer_logps(smollm2.config, smollm2.params, None, batch)).sum() / answer_tokens.sum()
    assert abs(base_loss - loss.item()) > TRAINED
    assert abs(float(found["loss"]) - loss.item()) <= LOSS_ERROR
    assert_gradients_equal(gradient.adapters.lora, theirs)
