"""Adapters out and in again without torch: files, places, refusals, and what is said where nothing can read them back."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import meetjax.proof as proof_module
from meetjax.adapters.algebra import scale
from meetjax.adapters.io import load_adapters, read_manifest, save_adapters
from meetjax.adapters.peft import CONFIG
from meetjax.adapters.tree import Bank, Edit, EditSite
from meetjax.errors import MeetjaxError
from meetjax.export import export_adapter, import_adapter
from meetjax.models.load import load
from tests.conftest import CHAT, assert_close, quick_forward, random_bank, take, write_model

FAR = 0.3
"""What the adapters here move the logits by at least."""


@pytest.fixture(autouse=True)
def no_torch(monkeypatch):
    """Where it is installed too: what reads the files there is for tests/parity."""
    find = importlib.util.find_spec
    monkeypatch.setattr(proof_module.importlib.util, "find_spec", lambda name: None if name in ("torch", "peft") else find(name))


@pytest.fixture
def saved(model, tmp_path):
    """Saves a bank as an adapter of the tiny model; returns the folder."""
    return lambda bank: save_adapters(tmp_path / "adapter", bank, base=model.name, fingerprint=model.fingerprint)


def bank_of(model, *kinds, editable=("down",)):
    return take(random_bank(model.config, kinds, editable=editable), 0)


def bias_only(model):
    t = np.array(bank_of(model, "edit").edit.down.t)
    t[0] = 0
    return Bank(edit=Edit(down=EditSite(np.zeros_like(t), t)))


def error_of(function) -> str:
    with pytest.raises(MeetjaxError) as caught:
        function()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_lora_out_at_a_strength_and_in_again(model, model_folder, saved, tmp_path):
    """The dial is fixed in what is written; where peft is missing that is said, and the files are there."""
    bank = bank_of(model, "lora")
    told = export_adapter(saved(bank), "peft", tmp_path / "out", str(model_folder), (0.7,))
    assert told == "not proved: torch and peft not installed, so nothing has read the files back (pip install torch peft)"
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["base_model_name_or_path"] == str(model_folder)
    assert "at strength 0.7" in (tmp_path / "out" / "README.md").read_text()
    import_adapter(tmp_path / "out", tmp_path / "back", str(model_folder))
    back = load_adapters(tmp_path / "back", model.fingerprint)
    expected = scale(bank, 0.7)
    assert jax.tree.structure(back) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, back, expected)
    assert read_manifest(tmp_path / "back")["recipe"] == {"imported from": "out"}


def test_merged_folder_loads_to_the_same_logits(model, model_folder, saved, tmp_path):
    bank = bank_of(model, "lora", "edit")
    export_adapter(saved(bank), "merged", tmp_path / "out", str(model_folder), (-0.5,))
    merged, tokens = load(tmp_path / "out"), np.arange(12, dtype=np.int32)[None]
    expected = quick_forward(model.config, model.params, tokens, bank, np.array([[-0.5]], np.float32))
    assert_close(quick_forward(merged.config, merged.params, tokens), expected)
    assert merged.config.biases == ("down", "gate", "up")


def test_control_vector_is_read_back_by_gguf(model, model_folder, saved, tmp_path):
    """gguf is always there: without torch our own blocks add what it reads."""
    found = export_adapter(saved(bias_only(model)), "gguf-vector", tmp_path / "out", str(model_folder), (2.0,))
    assert found.reader.startswith("gguf ") and found.holds and found.moved > FAR


@pytest.fixture(scope="module")
def bos_folder(tmp_path_factory):
    """A model whose chats begin with BOS."""
    return write_model(tmp_path_factory.mktemp("models") / "bos", chat="<s>" + CHAT)


@pytest.mark.parametrize("form", ["peft", "prompt-embeds"])
def test_a_soft_prompt_carries_bos_where_texts_begin_with_it(form, bos_folder, tmp_path):
    model = load(bos_folder)
    bank = bank_of(model, "prompt")
    adapter = save_adapters(tmp_path / "adapter", bank, base="bos", fingerprint=model.fingerprint)
    export_adapter(adapter, form, tmp_path / "out", str(bos_folder))
    (name,) = [path.name for path in (tmp_path / "out").glob("*.safetensors")]
    (vectors,) = load_file(tmp_path / "out" / name).values()
    np.testing.assert_array_equal(vectors, np.concatenate([np.asarray(model.params["embed"][:1]), bank.prompt.vectors[0]]))
    assert "give the text without its BOS" in (tmp_path / "out" / "README.md").read_text()
    if form == "peft":
        import_adapter(tmp_path / "out", tmp_path / "back", str(bos_folder))
        np.testing.assert_array_equal(load_adapters(tmp_path / "back").prompt.vectors, bank.prompt.vectors)


def test_a_soft_prompt_in_front_of_bos_is_refused(model, model_folder, bos_folder, saved, tmp_path):
    """Without BOS the two places are one; with it they are not, and peft's is the other one."""
    bank = bank_of(model, "prompt")
    export_adapter(saved(bank), "peft", tmp_path / "out", str(model_folder))
    np.testing.assert_array_equal(load_file(tmp_path / "out" / "adapter_model.safetensors")["prompt_embeddings"], bank.prompt.vectors[0])
    message = error_of(lambda: import_adapter(tmp_path / "out", tmp_path / "back", str(bos_folder)))
    assert "a soft prompt in front of BOS; here it stands behind it" in message
    assert not (tmp_path / "back").exists()


REFUSED = {
    ("merged", ("prompt",)): "kinds for --to merged; expected lora and edit; found prompt; prompt goes --to peft or prompt-embeds",
    ("peft", ("edit",)): "kinds for --to peft; expected lora or prompt; found edit; edit goes --to merged or gguf-vector",
    ("peft", ("prompt", "lora")): "expected lora or prompt; found prompt, lora; export its parts one by one",
    ("prompt-embeds", ("lora",)): "expected prompt; found lora; lora goes --to peft or merged",
    ("merged", ("identity",)): "found identity; no form holds identity, keep it as an adapter",
    ("gguf-vector", ("edit",)): "the edit scales the output of down, a control vector only adds",
}


@pytest.mark.parametrize(("form", "held"), REFUSED, ids=str)
def test_what_a_form_cannot_hold_is_refused(form, held, model, model_folder, saved, tmp_path):
    adapter = saved(bank_of(model, *held))
    message = error_of(lambda: export_adapter(adapter, form, tmp_path / "out", str(model_folder)))
    assert REFUSED[form, held] in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_strengths_that_cannot_be_fixed_are_refused(model, model_folder, saved, tmp_path):
    adapter = saved(bank_of(model, "prompt"))
    for strengths, told in {
        (0.5,): "expected one at strength 1; found [0.5]",
        (-1.0,): "expected >= 0",
        (0.0,): "a soft prompt at strength 0",
        (1.0, 1.0): "expected one for each of 1 gate columns; found 2",
        (float("nan"),): "expected finite numbers",
    }.items():
        message = error_of(lambda strengths=strengths: export_adapter(adapter, "peft", tmp_path / "out", str(model_folder), strengths))
        assert told in message


def test_controls_are_exported_one_by_one(model, model_folder, saved, tmp_path):
    """No file holds the sum of a bad control and a good one because nobody said which."""
    adapter = saved(random_bank(model.config, ("lora",)))
    for strengths in ((), (1.0,)):
        message = error_of(lambda strengths=strengths: export_adapter(adapter, "merged", tmp_path / "out", str(model_folder), strengths))
        assert "export: --strength; expected one for each of 2 gate columns; found 1" in message


def test_other_logits_leave_nothing_behind(model, model_folder, saved, tmp_path, monkeypatch):
    """A reader that computes the base model: over the tolerance."""

    def read(folder, model, scratch):
        return "blind", lambda ids: np.asarray(quick_forward(model.config, model.params, ids[None].astype(np.int32))[0])

    monkeypatch.setattr(proof_module, "READERS", {"gguf-vector": read})
    message = error_of(lambda: export_adapter(saved(bias_only(model)), "gguf-vector", tmp_path / "out", str(model_folder)))
    assert message.startswith("gguf-vector: blind computes other logits; expected at most 1e-04 of the largest; found blind: largest logit")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_what_is_there_already_stays(model, model_folder, saved, tmp_path):
    adapter = saved(bank_of(model, "lora"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    for path in (tmp_path / "out", tmp_path / "out" / "mine"):
        assert "is there already" in error_of(lambda path=path: export_adapter(adapter, "peft", path, str(model_folder)))
    assert "could not be written" in error_of(lambda: export_adapter(adapter, "peft", tmp_path / "out" / "mine" / "x", str(model_folder)))


def test_a_proof_is_one_line():
    proof = proof_module.Proof("peft 1", 2e-5, 20.0, 3.25, 61)
    assert str(proof) == (
        "peft 1: largest logit difference 2.00e-05, 1.0e-06 of the largest logit (tolerance 1e-04), over 61 tokens that the adapter "
        "moves by up to 3.25"
    )
    assert (
        proof.holds and not dataclasses.replace(proof, difference=2.1e-3).holds and not dataclasses.replace(proof, difference=np.nan).holds
    )
