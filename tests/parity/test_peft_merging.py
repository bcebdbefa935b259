"""Merging against peft, where both define the same thing.

peft's ties, with or without DARE, differs in two ways where the weights are not all 1: it elects signs before it weighs, and divides
by the number of agreeing entries and not by their weight, so that a result grows with the weights. Its trim rounds density * size
down. Its `linear`, `ties` and `dare_*` of adapters merge the factors; those that end in `_svd` merge the products, as we do.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from peft.utils import merge_utils

from meetjax.adapters.algebra import mix
from meetjax.adapters.merging import dare, dare_ties, linear, lora_delta, ties, to_lora
from meetjax.adapters.peft import lora_from_peft, lora_to_peft
from meetjax.adapters.tree import Bank, Lora, LoraSite

FLOAT = 1e-6
"""Relative: sums of a few float32 numbers in another order."""
SVD = 2e-5
"""Of the largest entry: LAPACK's float32 singular vectors, whose error grows with the inverse of the gap behind the rank."""
DIFFERS = 0.05
"""What merging of factors is off by at least, of the largest entry."""
RANK, WIDTH, OUT, SCALE = 3, 12, 10, 0.5


@pytest.fixture
def deltas():
    return [np.random.default_rng(seed).normal(size=(8, 5)).astype(np.float32) for seed in range(3)]


@pytest.fixture
def their_masks(monkeypatch):
    """Makes peft drop the entries that these trees do not have."""

    def use(kept):
        masks = iter([torch.from_numpy((np.asarray(leaf) != 0).astype(np.float32)) for leaf in kept])
        monkeypatch.setattr(torch, "bernoulli", lambda _: next(masks))

    return use


def torched(arrays):
    return [torch.from_numpy(np.array(array)) for array in arrays]


def close(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours), theirs.numpy(), rtol=FLOAT, atol=FLOAT)


def test_linear(deltas):
    weights = [0.7, -0.4, 1.3]
    close(linear(deltas, weights), merge_utils.task_arithmetic(torched(deltas), torch.tensor(weights)))


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_ties_of_equal_weights(deltas, density):
    close(ties(deltas, [1, 1, 1], density), merge_utils.ties(torched(deltas), torch.ones(3), density))


def test_ties_of_other_weights_is_theirs_on_weighted_entries(deltas):
    """The same merge where the entries are weighed before the signs are elected, divided by weight and not by number."""
    weights = torch.tensor([0.7, 0.2, 1.3])
    entries = torch.stack(torched(deltas))
    weighted = entries * weights[:, None, None]
    agrees = merge_utils.calculate_majority_sign_mask(weighted)
    mean = merge_utils.disjoint_merge(weighted, agrees)
    close(ties(deltas, weights.tolist(), 1.0), mean * agrees.sum(0) / (agrees * weights[:, None, None]).sum(0))


def test_dare_with_the_same_mask(deltas, their_masks):
    drawn = dare(deltas[0], jax.random.key(0), 0.6)
    their_masks([drawn])
    close(drawn, merge_utils.random_pruning(torch.from_numpy(deltas[0]), density=0.4, rescale=True))


def test_dare_ties_with_the_same_masks(deltas, their_masks):
    key = jax.random.key(0)
    drawn = [dare(delta, jax.random.fold_in(key, i), 0.6) for i, delta in enumerate(deltas)]
    their_masks(drawn)
    close(dare_ties(deltas, [1, 1, 1], key, 0.6), merge_utils.dare_ties(torched(deltas), torch.ones(3), 0.4))
    their_masks(drawn)
    close(linear(drawn, [0.7, 0.2, 1.3]), merge_utils.dare_linear(torched(deltas), torch.tensor([0.7, 0.2, 1.3]), 0.4))


@pytest.fixture
def loras():
    """Two LoRAs of one site in one layer."""

    def one(seed):
        draw = np.random.default_rng(seed)
        a, b = (draw.normal(size=shape).astype(np.float32) for shape in ((1, 1, WIDTH, RANK), (1, 1, RANK, OUT)))
        return Lora(q=LoraSite(a, b), scale=SCALE)

    return [one(0), one(1)]


@pytest.fixture
def merged_by_peft(loras):
    """merged_by_peft(combination_type, ...) -> float32[in, out], what peft's `add_weighted_adapter` of the two adds to the weight."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attn = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(WIDTH, OUT, bias=False)})

    def merged(combination, weights, **options):
        base = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"layers": torch.nn.ModuleList([Block()])})})
        config = peft.LoraConfig(r=RANK, lora_alpha=RANK * SCALE, target_modules=["q_proj"])
        model = peft.get_peft_model(base, config, adapter_name="0")
        model.add_adapter("1", config)
        for name, lora in zip("01", loras, strict=True):
            state = {path: torch.from_numpy(leaf) for path, leaf in lora_to_peft(lora).items()}
            assert not peft.set_peft_model_state_dict(model, state, adapter_name=name).unexpected_keys
        model.add_weighted_adapter(["0", "1"], weights, "merged", combination_type=combination, **options)
        layer = model.base_model.model["model"]["layers"][0].self_attn["q_proj"]
        return layer.get_delta_weight("merged").detach().numpy().T

    return merged


def close_to_largest(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=SVD * np.abs(theirs).max())


def product(deltas, rank):
    """What the LoRA of this rank nearest to a merged delta adds."""
    return lora_delta(to_lora(deltas, rank)[0])["q"][0]


@pytest.mark.parametrize("rank", [2, 2 * RANK])
def test_svd_is_the_linear_merge_at_a_rank(loras, merged_by_peft, rank):
    ours = product(linear([lora_delta(lora) for lora in loras], [0.7, 0.4]), rank)
    close_to_largest(ours, merged_by_peft("svd", [0.7, 0.4], svd_rank=rank))


def test_ties_svd(loras, merged_by_peft):
    ours = product(ties([lora_delta(lora) for lora in loras], [1, 1], 0.5), 4)
    close_to_largest(ours, merged_by_peft("ties_svd", [1.0, 1.0], svd_rank=4, density=0.5))


def test_dare_ties_svd(loras, merged_by_peft, their_masks):
    products, key = [lora_delta(lora) for lora in loras], jax.random.key(0)
    # peft stores a weight as (out, in).
    their_masks([dare(delta, jax.random.fold_in(key, i), 0.5)["q"][0].T for i, delta in enumerate(products)])
    close_to_largest(
        product(dare_ties(products, [1, 1], key, 0.5), 4), merged_by_peft("dare_ties_svd", [1.0, 1.0], svd_rank=4, density=0.5)
    )


def test_cat_is_mix(loras, merged_by_peft):
    mixed = mix([Bank(lora=lora) for lora in loras], [0.7, 0.4]).lora
    close_to_largest(lora_delta(mixed)["q"][0], merged_by_peft("cat", [0.7, 0.4]))


@pytest.mark.parametrize(("combination", "options"), [("linear", {}), ("ties", {"density": 0.5})])
def test_factors_merged_are_another_weight(loras, merged_by_peft, combination, options):
    """What peft does without `_svd` is not the merge of what the adapters add: here it is refused."""
    theirs, products = merged_by_peft(combination, [1.0, 1.0], **options), [lora_delta(lora) for lora in loras]
    ours = np.asarray((linear(products, [1, 1]) if combination == "linear" else ties(products, [1, 1], 0.5))["q"][0])
    assert np.abs(ours - theirs).max() > DIFFERS * np.abs(ours).max()


def test_a_merged_lora_goes_out_to_peft_and_back(loras):
    lora, _ = to_lora(linear([lora_delta(one) for one in loras], [0.5, 0.5]), 4)
    back = lora_from_peft(lora_to_peft(lora), lora.scale)
    assert all(jnp.array_equal(a, b) for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(lora), strict=True))
