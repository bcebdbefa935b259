"""Eight CPU devices, strict promotion, a compile cache, and tiny models, banks and compiled functions shared by all tests."""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# A folder a process: the cache's files are not written in one move, so another process could read half of one.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    os.path.join(tempfile.gettempdir(), "meetjax-test-compile-cache" + os.environ.get("PYTEST_XDIST_WORKER", "")),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# A program compiles in a sixth of the time, here and in the processes that tests start; see AS_USERS.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
)

import dataclasses
import functools
import json
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import meetjax.train.fit as fit_module
from meetjax.adapters.tree import KINDS, Bank, Edit, EditSite, Identity, Lora, LoraSite, Prompt, Reward, entry_axis
from meetjax.models import sites
from meetjax.models.config import ModelConfig, RopeScaling, from_hf
from meetjax.models.decoder import apply, init_params
from meetjax.models.load import load
from meetjax.train.optim import make_optimizer
from meetjax.train.step import make_step

# A silent float32 -> bfloat16 or [D] -> [B, T, D] promotion is how a scanned or sharded program goes wrong without an error.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiling takes seconds, so a draw has no deadline, and the same draws every time keep the compile cache warm.
hypothesis.settings.register_profile("meetjax", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("meetjax")

AS_USERS = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False, "xla_cpu_use_fusion_emitters": True}
"""Compiler options of the bitwise laws, which hold for the program a user runs."""
ROUNDING = 2e-5
"""Of logits of order 10: float32 sums over more columns, another batch size or another split are added in another order."""

TINY = ModelConfig(
    model_type="llama",
    vocab=97,
    width=32,
    hidden=48,
    layers=3,
    heads=4,
    kv_heads=2,
    head_width=8,
    tied_head=True,
    bos_token_id=1,
    eos_token_ids=(2,),
)
VARIANTS = {
    "tied": TINY,
    "llama3": ModelConfig(
        model_type="llama",
        vocab=97,
        width=32,
        hidden=48,
        layers=2,
        heads=4,
        kv_heads=4,
        head_width=8,
        rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 16),
        bos_token_id=1,
    ),
    "mistral": ModelConfig(
        model_type="mistral", vocab=97, width=32, hidden=48, layers=2, heads=4, kv_heads=2, head_width=8, sliding_window=5
    ),
    "qwen2": ModelConfig(
        model_type="qwen2",
        vocab=97,
        width=32,
        hidden=48,
        layers=2,
        heads=4,
        kv_heads=2,
        head_width=8,
        biases=("k", "q", "v"),
        sliding_window=4,
        window_layers=(1,),
        bos_token_id=1,
    ),
}

BATCH, LENGTH = 4, 9
TOKENS = np.random.default_rng(7).integers(3, 97, (BATCH, LENGTH)).astype(np.int32)
TOKENS[:3, 0] = 1
"""int32[4, 9]: three texts begin with BOS, the last does not."""

MOVING = tuple(kind for kind in KINDS if kind != "reward")
"""The kinds that move the model; a reward head only reads it."""
KINDS_ALONE = np.zeros((BATCH, 8), np.float32)
KINDS_ALONE[np.repeat(np.arange(4), 2), np.arange(8)] = [0.7, 1.6, 0.8, -0.5, 1.3, 0.4, 0.6, -0.3]
"""Gates of an `apart` bank with two adapters a kind: row 0 is under its prompts alone, row 1 LoRA, row 2 edits, row 3 identity blocks."""
KINDS_TOGETHER = np.random.default_rng(8).uniform(0, 1.2, (BATCH, 8)).astype(np.float32)
DIAL = np.array([0.5, 1.0, 0.0, 1.7], np.float32)


def pytest_xdist_auto_num_workers() -> int:
    """One more than cores: some tests wait for other processes."""
    return (os.cpu_count() or 1) + 1


MAPS = Path("/proc/self/maps")


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """A compiled program holds several of the 65,530 memory mappings that Linux gives a process; past them the compiler crashes."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()


forward = jax.jit(apply, static_argnums=0, compiler_options=AS_USERS)
"""`apply` as users compile it."""
quick_forward = jax.jit(apply, static_argnums=0)


def weighted_logits(bank, params, config, tokens, gates):
    """A loss of order 1 that every logit enters with its own weight, and the logits."""
    logits = apply(config, params, tokens, bank, gates)
    return jnp.mean(logits * jnp.asarray(np.random.default_rng(9).normal(size=logits.shape), jnp.float32)), logits


loss_and_grad = jax.jit(jax.value_and_grad(weighted_logits, has_aux=True), static_argnums=2)
"""((loss, logits), gradient of the bank)."""


def assert_close(left, right, *, like=None, factor=1.0):
    """|left - right| <= factor * ROUNDING * max(1, largest |like|); `like` is `right` unless told."""
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    bound = factor * ROUNDING * max(1.0, float(np.abs(right if like is None else np.asarray(like)).max()))
    np.testing.assert_allclose(left, right, rtol=0, atol=bound)


def assert_trees_close(left, right, factor=1.0):
    """`assert_close` leaf by leaf, each within factor * ROUNDING of its own largest number."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(left)[0], jax.tree.leaves(right), strict=True):
        scale = max(float(np.abs(np.asarray(b)).max()), 1e-30)
        np.testing.assert_allclose(np.asarray(a) / scale, np.asarray(b) / scale, rtol=0, atol=factor * ROUNDING, err_msg=str(path))


def assert_differs(left, right):
    """Far apart: guards a law against holding because nothing happened."""
    assert float(np.abs(np.asarray(left, np.float64) - np.asarray(right, np.float64)).max()) > 1e-2


def random_params(config, seed=0):
    """Parameters where no leaf is neutral: biases are not 0 and norms are not 1, unlike at initialisation."""
    draw = np.random.default_rng(seed)
    leaves, tree = jax.tree.flatten(sites.shapes(config), is_leaf=lambda node: isinstance(node, tuple))
    # numpy: slicing a jax array compiles a program for every shape
    params = jax.tree.unflatten(tree, [(0.2 * draw.normal(size=shape)).astype(np.float32) for shape in leaves])
    norms = {name: 1 + params["blocks"][name] for name in ("attn_norm", "mlp_norm")}
    return params | {"norm": 1 + params["norm"], "blocks": params["blocks"] | norms}


def random_bank(config, kinds=MOVING, *, entries=(0, 1), rank=2, length=4, linear=sites.LINEAR, editable=sites.EDITABLE, seed=1):
    """A bank of `kinds` where nothing is neutral, with len(entries) adapters a kind; prompts but the first are one token shorter."""
    draw, count = np.random.default_rng(seed), len(entries)

    def normal(*shape):
        return (0.2 * draw.normal(size=shape)).astype(np.float32)

    def size(name):
        return sites.shape(config, sites.BLOCK[name])

    fields = {}
    if "prompt" in kinds:
        vectors = normal(count, length, config.width)
        vectors[1:, -1] = 0
        fields["prompt"] = Prompt(vectors, entries)
    if "lora" in kinds:
        pairs = {
            n: LoraSite(normal(config.layers, count, size(n)[0], rank), normal(config.layers, count, rank, size(n)[1])) for n in linear
        }
        fields["lora"] = Lora(**pairs, scale=1.5, entries=entries)
    if "edit" in kinds:
        vectors = {n: EditSite(normal(config.layers, count, size(n)[1]), normal(config.layers, count, size(n)[1])) for n in editable}
        fields["edit"] = Edit(**vectors, entries=entries)
    if "identity" in kinds:
        fields["identity"] = Identity({n: normal(1, count, *sites.shape(config, s)) for n, s in sites.block_sites(config).items()}, entries)
    if "reward" in kinds:
        fields["reward"] = Reward(normal(count, config.width), entries)
    return Bank(**fields)


def apart(bank):
    """The same bank with a gate column for every adapter of every kind."""
    offset, fields = 0, {}
    for kind in KINDS:
        if (tree := getattr(bank, kind)) is not None:
            fields[kind] = dataclasses.replace(tree, entries=tuple(offset + i for i in range(len(tree.entries))))
            offset += len(tree.entries)
    return Bank(**fields)


def take(bank, row):
    """The bank of adapter `row` of every kind alone, on gate column 0."""
    picked = {}
    for kind in KINDS:
        tree = getattr(bank, kind)
        if tree is not None:
            axis = entry_axis(kind)
            picked[kind] = dataclasses.replace(jax.tree.map(lambda x, axis=axis: np.take(x, [row], axis), tree), entries=(0,))
    return Bank(**picked)


CORPUS = ["the cat sat on the mat", "a short answer to a long question", "user assistant system", "hello there, how are you?"] * 4
SPECIAL = ["<s>", "<|start|>", "<|end|>"]
CHAT = (
    "{% for m in messages %}{% if loop.index0 and m.role == messages[loop.index0 - 1].role %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def build_tokenizer(adds_bos: bool, chat: str | None) -> PreTrainedTokenizerFast:
    """A byte-level BPE with 300 tokens; every text is a lossless sequence of them."""
    model = Tokenizer(BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(CORPUS, trainer)
    if adds_bos:
        model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="<|end|>")
    tokenizer.chat_template = chat
    return tokenizer


CHAT_MODEL = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
"""`config.json` of a tiny model for the tokenizer of `build_tokenizer`."""


def write_model(folder, chat=CHAT, seed=0):
    """A Hugging Face folder of a random tiny model; returns the folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CHAT_MODEL))
    build_tokenizer(adds_bos=False, chat=chat).save_pretrained(folder)
    config = from_hf(CHAT_MODEL)
    params = random_params(config, seed)
    tensors = {site.hf: params[name] for name, site in sites.top_sites(config).items()}
    for name, site in sites.block_sites(config).items():
        for layer in range(config.layers):
            leaf = params["blocks"][name][layer]
            tensors[f"model.layers.{layer}.{site.hf}"] = leaf.T if site.linear else leaf
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def write_pairs(path, count=24):
    """A JSONL file of preference pairs that a tiny model can learn: the chosen answer is the short one; returns the path."""
    nouns, draw = ["cat", "mat", "answer", "question", "user"], np.random.default_rng(3)
    rows = [
        {
            "prompt": f"{i} {draw.choice(nouns)}?",
            "chosen": f"the {draw.choice(nouns)}",
            "rejected": "how are you " + " ".join(draw.choice(nouns, 1 + i % 3)),
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


RECIPE_STEPS = 48


def write_recipe(folder, model_folder, *, steps=RECIPE_STEPS, trains='LoraSpec(rank=96, sites=("q", "down")),', objective="Dpo()"):
    """An experiment file that trains on `write_pairs` in `folder`; every file of one `trains` uses the same programs."""
    file = folder / "recipe.py"
    file.write_text(
        f"""from meetjax.adapters.edit import EditSpec
from meetjax.adapters.lora import LoraSpec
from meetjax.objectives.preference import Dpo
from meetjax.objectives.sft import Sft
from meetjax.train.stage import Data, Optim, Recipe, Stage, Train


def get_config():
    return Recipe(
        name="tiny",
        model={str(model_folder)!r},
        data=Data(path={str(write_pairs(folder / "pairs.jsonl"))!r}, held_out=6, max_length=64),
        train=Train(steps={steps}, batch_size=4, save_every=4),
        stages=(Stage(({trains}), {objective}, Optim(learning_rate=1e-2)),),
    )
"""
    )
    return file


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A Hugging Face folder of a tiny model with a chat template."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def model(model_folder):
    """The same, loaded."""
    return load(model_folder)


@pytest.fixture(scope="session")
def command(tmp_path_factory):
    """Runs the `meetjax` command line in processes of their own: `command(*arguments)` -> (status, stdout, stderr).

    `command.start(*arguments)` returns the process id at once, `command.finish(pid)` waits and returns the three; without a pid, of
    the last one started. What has not ended after `limit` seconds is killed. A process has `devices` CPU devices.
    The processes are forks of one that has imported everything and started nothing, which saves six seconds each.
    """
    output = tmp_path_factory.mktemp("command")
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(
        [sys.executable, Path(__file__).parent / "fork_server.py"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=output, env=environment,
    )  # fmt: skip

    started = {}

    def ask(request):
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    def start(*arguments, devices=1, folder=output, limit=300, **environment):
        files = [output / f"{len(started)}.{name}" for name in ("out", "err")]
        request = {"arguments": [str(argument) for argument in arguments], "stdout": str(files[0]), "stderr": str(files[1])}
        pid = ask(request | {"devices": devices, "folder": str(folder), "environment": environment})
        killer = threading.Timer(limit, os.kill, (pid, signal.SIGKILL))
        killer.daemon = True
        killer.start()
        started[pid] = *files, killer
        return pid

    def finish(pid=None):
        pid = pid or list(started)[-1]
        status = ask(pid)
        out, err, killer = started[pid]
        killer.cancel()
        return types.SimpleNamespace(status=status, out=out.read_text(), err=err.read_text())

    def run(*arguments):
        start(*arguments)
        return finish()

    run.start, run.finish = start, finish
    yield run
    server.stdin.close()
    server.wait()
    server.stdout.close()


shared_step = functools.cache(make_step)
"""`make_step`, one program for all runs of a stage."""


@pytest.fixture(scope="module")
def shared_training():
    """`fit` in this process trains by `shared_step`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_module, "make_optimizer", functools.cache(make_optimizer))
        patch.setattr(fit_module, "make_step", shared_step)
        yield


@pytest.fixture(scope="session")
def aligned(model_folder, command, tmp_path_factory):
    """(experiment file, output folder, what it printed) of a run of `meetjax align` that nothing disturbed."""
    folder = tmp_path_factory.mktemp("aligned")
    file = write_recipe(folder, model_folder, steps=RECIPE_STEPS)
    done = command("align", file, "--set", f"out={folder / 'out'}")
    assert (done.status, done.err) == (0, "")
    return file, folder / "out", done.out


@pytest.fixture(scope="session")
def tiny():
    """(config, params) of a three-layer model with a tied head."""
    return TINY, jax.jit(init_params, static_argnums=0)(TINY, jax.random.key(0))


@pytest.fixture(scope="session", params=sorted(VARIANTS))
def variant(request):
    """(config, params) of each tiny model in turn, no leaf neutral."""
    config = VARIANTS[request.param]
    return config, random_params(config)


@pytest.fixture(scope="session")
def base():
    """(config, params, logits of TOKENS) of the tied model, no leaf neutral."""
    params = random_params(TINY)
    return TINY, params, np.asarray(forward(TINY, params, TOKENS))


def lay_together(batch):
    """The same prompts and answers, all answers to a prompt behind one copy of its first `common` tokens (no padding)."""
    prompts, answers, _ = batch.tokens.shape
    common = batch.starts.min(axis=1)
    for b, first in enumerate(common):
        assert (batch.tokens[b, :, :first] == batch.tokens[b, :1, :first]).all(), "the answers continue one prompt"
    begins = np.zeros_like(batch.starts)
    begins[:, 1:] = np.cumsum(batch.ends - common[:, None], axis=1)[:, :-1]
    ends = begins + batch.ends
    tokens = np.zeros((prompts, 1, ends.max()), np.int32)
    for b, first in enumerate(common):
        tokens[b, 0, :first] = batch.tokens[b, 0, :first]
        for c in range(answers):
            tokens[b, 0, begins[b, c] + first : ends[b, c]] = batch.tokens[b, c, first : batch.ends[b, c]]
    return dataclasses.replace(batch, tokens=tokens, starts=begins + batch.starts, ends=ends, common=common)
