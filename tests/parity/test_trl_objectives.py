"""Every objective against trl's own trainers on random log-probabilities of answers of many lengths: losses, gradients, rewards.

The trainers get what a model would have returned. Where trl means something else on purpose, a test says what, and compares the rest.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
import trl

from meetjax.objectives.kto import ApoZeroUnpaired, Kto
from meetjax.objectives.preference import ApoDown, ApoZero, Cdpo, Dpo, Hinge, Ipo, NormalizedDpo, RobustDpo
from meetjax.objectives.reference_free import Cpo, Orpo, Simpo
from meetjax.types import Batch
from tests.conftest import build_tokenizer

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # or importing what is experimental warns

ERROR = 1e-5
"""A handful of float32 operations on sums of some 40 nats: relative to the largest of 1 and the numbers compared."""
COMMON = {
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
    "per_device_train_batch_size": 4, "max_length": 64, "dataloader_pin_memory": False,
}  # fmt: skip
PAIRS, WIDTH, VOCAB = 6, 14, 12
PROMPT = 3
"""Tokens; answers have 1 to WIDTH - PROMPT."""


def tiny_llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def make_trainer(kind, config, rows, folder, **more):
    """A trainer on a model that no test runs: its losses are what is wanted of it."""
    arguments = config(output_dir=str(folder), **COMMON)
    data = datasets.Dataset.from_list(rows)
    tokenizer = build_tokenizer(adds_bos=False, chat=None)
    trainer = kind(tiny_llama(), args=arguments, train_dataset=data, processing_class=tokenizer, **more)
    trainer.model.train()
    return trainer


PAIR_ROWS = [{"prompt": "the cat", "chosen": " sat", "rejected": " on the mat"}] * 4
LABELLED_ROWS = [{"prompt": "the cat", "completion": " sat", "label": n % 2 == 0} for n in range(4)]


@pytest.fixture(scope="module")
def dpo_trainer(tmp_path_factory):
    trainer = make_trainer(trl.DPOTrainer, trl.DPOConfig, PAIR_ROWS, tmp_path_factory.mktemp("dpo"), ref_model=tiny_llama())
    trainer.precompute_ref_logps = True  # the reference's sums come with the batch
    return trainer


@pytest.fixture(scope="module")
def kto_trainer(tmp_path_factory):
    trainer = make_trainer(trl.KTOTrainer, trl.KTOConfig, LABELLED_ROWS, tmp_path_factory.mktemp("kto"), ref_model=tiny_llama())
    trainer.precompute_ref_logps = True
    return trainer


@pytest.fixture(scope="module")
def cpo_trainer(tmp_path_factory):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    return make_trainer(CPOTrainer, CPOConfig, PAIR_ROWS, tmp_path_factory.mktemp("cpo"))


@pytest.fixture(scope="module")
def orpo_trainer(tmp_path_factory):
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return make_trainer(ORPOTrainer, ORPOConfig, PAIR_ROWS, tmp_path_factory.mktemp("orpo"))


def assert_equal(found, expected):
    bound = ERROR * max(1.0, float(np.abs(np.asarray(expected)).max()))
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=bound)


def draw_lengths(seed, *shape):
    return np.random.default_rng(seed).integers(1, WIDTH - PROMPT + 1, shape).astype(np.int32)


def make_batch(tokens, ref_logps=None, classes=None, prompt=PROMPT):
    starts = np.full(tokens.shape, prompt, np.int32)
    weights = np.ones(len(tokens), np.float32)
    return Batch(np.ones((*tokens.shape, WIDTH), np.int32), starts, starts + tokens, weights, ref_logps=ref_logps, classes=classes)


def ours(objective, logps, batch):
    """(mean loss, metrics as means, gradient of the mean loss in the sums [B, C])."""

    def mean(s):
        pooled = () if not hasattr(objective, "pool") else (jnp.divide(*objective.pool(s, batch)),)
        total, count, metrics = objective(s, batch, *pooled)
        return total / count, metrics

    (loss, metrics), gradient = jax.value_and_grad(mean, has_aux=True)(jnp.asarray(logps))
    return loss, {name: float(value / weight) for name, (value, weight) in metrics.items()}, gradient


def masks(tokens):
    """bool[rows, WIDTH]: the answer's places behind the prompt."""
    place = np.arange(WIDTH)
    return (place >= PROMPT) & (place < PROMPT + tokens[:, None])


def token_scores(logps, tokens):
    """(scores [rows, WIDTH - 1] that sum to logps over the answer and are 0 elsewhere, as the fused head reports them; the mask)."""
    mask = masks(tokens)[:, 1:]
    share = np.random.default_rng(0).uniform(0.5, 1.5, mask.shape) * mask
    scores = (share / share.sum(1, keepdims=True) * logps[:, None]).astype(np.float32)
    return torch.from_numpy(scores).requires_grad_(), torch.from_numpy(masks(tokens)).long()


def reported(scores):
    blank = torch.zeros_like(scores)
    return SimpleNamespace(log_probs=scores, entropy=blank, mean_logits=blank, is_top1=scores.detach() > 0)


def answer_gradient(scores, tokens):
    """d loss / d s of each row: the same at every token of the answer, and 0 on the prompt is of no account."""
    slopes = scores.grad.numpy()
    rows = [slope[mask] for slope, mask in zip(slopes, masks(tokens)[:, 1:], strict=True)]
    for row in rows:
        np.testing.assert_allclose(row, row[0], rtol=0, atol=1e-7)
    return np.array([row[0] for row in rows])


def their_dpo(trainer, logps, ref_logps, tokens):
    """(loss, metrics, gradient in the sums [B, 2]) by trl's DPOTrainer."""
    rows = tokens.T.reshape(-1)
    scores, mask = token_scores(logps.T.reshape(-1), rows)
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    inputs |= {"ref_chosen_logps": torch.from_numpy(ref_logps[:, 0]), "ref_rejected_logps": torch.from_numpy(ref_logps[:, 1])}
    loss = trainer.compute_loss(lambda **_: reported(scores), inputs)
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.item(), metrics, answer_gradient(scores, rows).reshape(2, -1).T


DPO_FAMILY = {  # name -> (ours, trl's loss_type, what trl calls the hyperparameters)
    "sigmoid": (Dpo(0.3), "sigmoid", {"beta": 0.3}),
    "sigmoid-large": (Dpo(2.0), "sigmoid", {"beta": 2.0}),
    "robust": (RobustDpo(0.3, 0.1), "robust", {"beta": 0.3, "label_smoothing": 0.1}),
    "robust-0.4": (RobustDpo(0.1, 0.4), "robust", {"beta": 0.1, "label_smoothing": 0.4}),
    "ipo": (Ipo(0.1), "ipo", {"beta": 0.1}),
    "ipo-small": (Ipo(0.02), "ipo", {"beta": 0.02}),
    "hinge": (Hinge(0.3), "hinge", {"beta": 0.3}),
    "apo_zero": (ApoZero(0.3), "apo_zero", {"beta": 0.3}),
    "apo_down": (ApoDown(0.3), "apo_down", {"beta": 0.3}),
    "sigmoid_norm": (NormalizedDpo(5.0), "sigmoid_norm", {"beta": 5.0}),
}


def set_loss(trainer, monkeypatch, loss_type, **settings):
    monkeypatch.setattr(trainer, "loss_types", [loss_type])
    monkeypatch.setattr(trainer, "loss_weights", [1.0])
    for name, value in settings.items():
        monkeypatch.setattr(trainer, name, value)


def draw_pairs(count=PAIRS):
    """(s, s_ref, n), each [B, 2]: margins of both signs and up to some 30 nats."""
    draw = np.random.default_rng(11)
    logps, ref_logps = (draw.normal(-40, 12, (PAIRS, 2)).astype(np.float32)[:count] for _ in range(2))
    return logps, ref_logps, draw_lengths(3, PAIRS, 2)[:count]


@pytest.mark.parametrize("name", DPO_FAMILY)
def test_dpo_family_parity(dpo_trainer, monkeypatch, name):
    objective, loss_type, settings = DPO_FAMILY[name]
    set_loss(dpo_trainer, monkeypatch, loss_type, **settings)
    logps, ref_logps, tokens = draw_pairs()
    theirs, their_metrics, their_gradient = their_dpo(dpo_trainer, logps, ref_logps, tokens)
    loss, metrics, gradient = ours(objective, logps, make_batch(tokens, ref_logps))
    assert_equal(loss, theirs)
    assert_equal(gradient, their_gradient)
    assert np.abs(their_gradient).max() > 1e-3
    assert 0 < metrics["rewards/accuracies"] < 1
    for metric, value in metrics.items():
        assert_equal(value, their_metrics[metric])


@pytest.mark.parametrize("epsilon", [0.1, 0.3])
def test_cdpo_parity(dpo_trainer, monkeypatch, epsilon):
    """trl has cDPO no more, but its `aot` sorts a batch of one pair into itself and then smooths the label."""
    set_loss(dpo_trainer, monkeypatch, "aot", beta=0.3, label_smoothing=epsilon)
    logps, ref_logps, tokens = draw_pairs()
    for n in range(PAIRS):
        one = slice(n, n + 1)
        theirs, their_metrics, their_gradient = their_dpo(dpo_trainer, logps[one], ref_logps[one], tokens[one])
        loss, metrics, gradient = ours(Cdpo(0.3, epsilon), logps[one], make_batch(tokens[one], ref_logps[one]))
        assert_equal(loss, theirs)
        assert_equal(gradient, their_gradient)
        assert_equal(metrics["rewards/margins"], their_metrics["rewards/margins"])


def test_trl_ignores_the_smoothing_of_its_sigmoid_loss(dpo_trainer, monkeypatch):
    """Where older versions computed cDPO, this one computes DPO: the setting is not to be ported."""
    set_loss(dpo_trainer, monkeypatch, "sigmoid", beta=0.3, label_smoothing=0.3)
    logps, ref_logps, tokens = draw_pairs()
    theirs, _, _ = their_dpo(dpo_trainer, logps, ref_logps, tokens)
    assert_equal(ours(Dpo(0.3), logps, make_batch(tokens, ref_logps))[0], theirs)
    assert abs(ours(Cdpo(0.3, 0.3), logps, make_batch(tokens, ref_logps))[0] - theirs) > 1e-2


def test_trl_has_no_ipo_on_sums(dpo_trainer, monkeypatch):
    """The two forms agree where all answers have one token."""
    set_loss(dpo_trainer, monkeypatch, "ipo", beta=0.1)
    logps, ref_logps, _ = draw_pairs()
    tokens = np.ones((PAIRS, 2), np.int32)
    theirs, _, their_gradient = their_dpo(dpo_trainer, logps, ref_logps, tokens)
    loss, _, gradient = ours(Ipo(0.1, length_normalize=False), logps, make_batch(tokens, ref_logps))
    assert_equal(loss, theirs)
    assert_equal(gradient, their_gradient)


CLASSES = {"mixed": [1, 0, 0, 1, 1, 0], "good": [1] * 6, "bad": [0] * 6}


@pytest.mark.parametrize("classes", CLASSES.values(), ids=CLASSES)
@pytest.mark.parametrize("gain", [6.0, -6.0], ids=["kl", "kl-clipped"])
@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_kto_parity(kto_trainer, monkeypatch, name, gain, classes):
    """Losses, gradients and what is logged, with a KL estimate above and below 0; trl's chosen and rejected are good and bad here."""
    objective = Kto(0.2, 1.0, 1.3) if name == "kto" else ApoZeroUnpaired(0.2, 1.0, 1.3)
    settings = {"beta": 0.2, "desirable_weight": 1.0, "undesirable_weight": 1.3, "loss_type": name, "calculate_KL": objective.partners}
    for setting, value in settings.items():
        monkeypatch.setattr(kto_trainer, setting, value)
    kto_trainer._metrics["train"].clear()
    logps, ref_logps, tokens = draw_pairs()
    ref_logps[:, 1] = logps[:, 1] - gain + np.random.default_rng(0).normal(0, 3, PAIRS).astype(np.float32)
    scores, mask = token_scores(logps[:, 0], tokens[:, 0])
    partner_scores, partner_mask = token_scores(logps[:, 1], tokens[:, 1])
    inputs = {
        "input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
        "KL_input_ids": torch.zeros_like(mask), "KL_attention_mask": torch.ones_like(mask), "KL_completion_mask": partner_mask,
        "label": torch.tensor(classes), "ref_logps": torch.from_numpy(ref_logps[:, 0]), "ref_KL_logps": torch.from_numpy(ref_logps[:, 1]),
    }  # fmt: skip
    loss = kto_trainer.compute_loss(lambda input_ids, **_: reported(scores if input_ids.any() else partner_scores), inputs)
    loss.backward()

    answers = 2 if objective.partners else 1
    batch = make_batch(tokens[:, :answers], ref_logps[:, :answers], np.array(classes, np.int32))
    found, metrics, gradient = ours(objective, logps[:, :answers], batch)
    assert_equal(found, loss.item())
    assert_equal(gradient[:, 0], answer_gradient(scores, tokens[:, 0]))
    assert partner_scores.grad is None
    expected = {name: values[-1] for name, values in kto_trainer._metrics["train"].items()}
    if objective.partners:
        np.testing.assert_array_equal(gradient[:, 1], 0.0)
        assert (metrics["kl"] > 1) == (gain > 0)
        assert_equal(metrics["kl"], expected["kl"])
    for side, their_side, label in (("good", "chosen", 1), ("bad", "rejected", 0)):
        for metric in ("rewards", "logps"):
            assert (label in classes) == (f"{metric}/{their_side}" in expected)
            if label in classes:
                assert_equal(metrics[f"{metric}/{side}"], expected[f"{metric}/{their_side}"])


class Logits:
    """Random logits in place of a model, for the trainers that score the tokens themselves; chosen rows first."""

    def __init__(self, tokens, prompt, seed=5):
        draw, rows = np.random.default_rng(seed), tokens.T.reshape(-1)
        place = np.arange(WIDTH)[None]
        ids = draw.integers(0, VOCAB, (len(rows), WIDTH))
        labels = np.where((place >= prompt) & (place < prompt + rows[:, None]), ids, -100)
        attended = (place < prompt + rows[:, None]).astype(np.int64)
        values = {"input_ids": ids, "attention_mask": attended, "labels": labels}
        sides = {"chosen": slice(0, len(tokens)), "rejected": slice(len(tokens), None)}
        self.batch = {f"{side}_{n}": torch.from_numpy(v[rows]) for side, rows in sides.items() for n, v in values.items()}
        self.logits = torch.from_numpy(draw.normal(0, 2, (len(rows), WIDTH, VOCAB)).astype(np.float32)).requires_grad_()
        own = torch.log_softmax(self.logits[:, :-1], 2).gather(2, torch.from_numpy(ids[:, 1:, None]))[:, :, 0]
        self.sums = torch.where(torch.from_numpy(labels[:, 1:] >= 0), own, 0.0).sum(1)
        self.whole = -own[torch.from_numpy(attended[:, 1:] == 1) & (torch.arange(len(rows))[:, None] < len(tokens))].mean()
        """trl's likelihood term of ORPO: over all tokens of prompts and chosen answers, but the first."""

    def __call__(self, ids, attention_mask, use_cache):
        return SimpleNamespace(logits=self.logits)

    def logps(self):
        """float32[B, 2], chosen first."""
        return self.sums.detach().numpy().reshape(2, -1).T.copy()

    def pulled(self, gradient):
        """The gradient in the logits that a gradient in the sums [B, 2] is."""
        pull = torch.from_numpy(np.array(gradient)).T.reshape(-1)
        return torch.autograd.grad(self.sums, self.logits, pull, retain_graph=True)[0].numpy()


def their_pairs(trainer, model):
    """(loss, metrics, gradient in the logits)."""
    loss, metrics = trainer.get_batch_loss_metrics(model, model.batch)
    return loss.item(), metrics, torch.autograd.grad(loss, model.logits, retain_graph=True)[0].numpy()


def even_chosen():
    """Lengths with which a mean over chosen tokens is a mean over chosen answers; the rejected ones differ."""
    tokens = draw_lengths(3, PAIRS, 2)
    tokens[:, 0] = 7
    return tokens


CPO_FAMILY = {
    "simpo": (Simpo(2.5, 0.3), {"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 0.75, "cpo_alpha": 0.0}),
    "cpo": (Cpo(0.1, 1.0), {"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 1.0}),
    "cpo-0.3": (Cpo(0.4, 0.3), {"loss_type": "sigmoid", "beta": 0.4, "cpo_alpha": 0.3}),
    "cpo-alone": (Cpo(0.4, 0.0), {"loss_type": "sigmoid", "beta": 0.4, "cpo_alpha": 0.0}),
    "cdpo": (Cdpo(0.3, 0.2), {"loss_type": "sigmoid", "beta": 0.3, "cpo_alpha": 0.0, "label_smoothing": 0.2}),
}
"""CPO with a smoothed label is cDPO under a reference that gives every answer log-probability 0."""


@pytest.mark.parametrize("name", CPO_FAMILY)
def test_cpo_and_simpo_parity(cpo_trainer, monkeypatch, name):
    """trl logs the mean log-probability for SimPO and the sum for CPO as `logps`; here it is the sum in both."""
    objective, settings = CPO_FAMILY[name]
    for setting, value in settings.items():
        monkeypatch.setattr(cpo_trainer, setting, value, raising=False)
    tokens = draw_lengths(3, PAIRS, 2) if settings["cpo_alpha"] == 0 else even_chosen()
    model = Logits(tokens, PROMPT)
    theirs, their_metrics, their_gradient = their_pairs(cpo_trainer, model)
    loss, metrics, gradient = ours(objective, model.logps(), make_batch(tokens, np.zeros((PAIRS, 2), np.float32)))
    assert_equal(loss, theirs)
    assert_equal(model.pulled(gradient), their_gradient)
    assert np.abs(their_gradient).max() > 1e-3
    for metric in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert_equal(metrics[metric], their_metrics[metric])
    expected = model.logps() / tokens if name == "simpo" else model.logps()
    assert_equal([their_metrics["logps/chosen"], their_metrics["logps/rejected"]], expected.mean(0))
    assert_equal([metrics["logps/chosen"], metrics["logps/rejected"]], model.logps().mean(0))


def test_cpo_likelihood_is_a_mean_over_answers(cpo_trainer, monkeypatch):
    """trl's is a mean over all chosen tokens of the batch, so that a long answer weighs more; the preference term is the same."""
    for setting, value in {"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 1.0}.items():
        monkeypatch.setattr(cpo_trainer, setting, value)
    tokens = draw_lengths(3, PAIRS, 2)
    model = Logits(tokens, PROMPT)
    theirs, their_metrics, _ = their_pairs(cpo_trainer, model)
    chosen = model.logps()[:, 0]
    assert_equal(their_metrics["nll_loss"], -chosen.sum() / tokens[:, 0].sum())
    likelihood = -np.mean(chosen / tokens[:, 0])
    assert abs(likelihood - their_metrics["nll_loss"]) > 1e-3
    loss, _, _ = ours(Cpo(0.1, 1.0), model.logps(), make_batch(tokens))
    assert_equal(loss - likelihood, theirs - their_metrics["nll_loss"])


@pytest.mark.parametrize("weight", [0.1, 1.5])
def test_orpo_parity(orpo_trainer, monkeypatch, weight):
    """Prompts of one token, which nothing predicts, so that trl's likelihood is of the answer alone as ours is."""
    monkeypatch.setattr(orpo_trainer, "beta", weight)
    tokens = even_chosen()
    model = Logits(tokens, prompt=1)
    theirs, their_metrics, their_gradient = their_pairs(orpo_trainer, model)
    loss, metrics, gradient = ours(Orpo(weight), model.logps(), make_batch(tokens, prompt=1))
    assert_equal(loss, theirs)
    assert_equal(model.pulled(gradient), their_gradient)
    assert np.abs(their_gradient).max() > 1e-3
    assert_equal(metrics["rewards/margins"], weight * their_metrics["log_odds_chosen"])


def test_orpo_likelihood_and_rewards_are_of_the_answer_and_its_odds(orpo_trainer, monkeypatch):
    """trl's likelihood is over all tokens of prompts and chosen answers, its rewards are lambda a(y). The odds term is the same, and
    the rewards order answers alike, since the odds grow with a.
    """
    monkeypatch.setattr(orpo_trainer, "beta", 0.5)
    tokens = draw_lengths(3, PAIRS, 2)
    model = Logits(tokens, PROMPT)
    theirs, their_metrics, _ = their_pairs(orpo_trainer, model)
    loss, metrics, _ = ours(Orpo(0.5), model.logps(), make_batch(tokens))
    assert_equal(their_metrics["nll_loss"], model.whole.item())
    means = model.logps() / tokens
    assert abs(model.whole.item() + means[:, 0].mean()) > 1e-3
    assert_equal(loss + means[:, 0].mean(), theirs - their_metrics["nll_loss"])
    assert_equal([their_metrics["rewards/chosen"], their_metrics["rewards/rejected"]], 0.5 * means.mean(0))
    assert_equal(metrics["rewards/accuracies"], their_metrics["rewards/accuracies"])
    assert 0 < metrics["rewards/accuracies"] < 1


def test_orpo_stays_finite_where_trl_does_not(orpo_trainer):
    """An answer of probability 1: our odds are clamped at a = -1e-4 nats a token, trl's are infinite."""
    certain, likely = torch.tensor([0.0]), torch.tensor([-1.0])
    assert not torch.isfinite(orpo_trainer.odds_ratio_loss(certain, likely)[4])
    loss, _, gradient = ours(Orpo(), np.array([[0.0, -1.0]], np.float32), make_batch(np.ones((1, 2), np.int32)))
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()
