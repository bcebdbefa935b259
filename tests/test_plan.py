"""What a plan is made of: shapes of published models, counted traffic, settings by rule, and one real compile where libtpu is."""

from __future__ import annotations

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import meetjax.plan.chips as chips_module
import meetjax.plan.settings as settings_module
from meetjax.adapters.tree import count_parameters
from meetjax.errors import MeetjaxError
from meetjax.models import sites
from meetjax.models.config import to_hf
from meetjax.models.published import PUBLISHED, find_config
from meetjax.plan.chips import CHIPS, open_topology
from meetjax.plan.collectives import count_traffic
from meetjax.plan.compiler import ask, shortage
from meetjax.plan.question import RECIPES, Answer, Question
from meetjax.plan.settings import first_setting, neighbours, suggest
from meetjax.plan.table import as_json, as_table
from meetjax.train.sharding import make_mesh
from tests.conftest import TINY

PARAMETERS = {  # as counted in the published checkpoints
    "llama-7b": 6_738_415_616, "llama-30b": 32_528_943_616, "llama-65b": 65_285_660_672, "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192, "llama-3-8b": 8_030_261_248, "llama-3.1-405b": 405_853_388_800, "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824, "mistral-7b-v0.1": 7_241_732_096, "mistral-7b-v0.3": 7_248_023_552, "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-3b": 3_085_938_688, "qwen2.5-7b": 7_615_616_512, "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352, "qwen2.5-72b": 72_706_203_648, "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}  # fmt: skip
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_published_shapes_have_the_published_size(name):
    shapes = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.bfloat16), sites.shapes(find_config(name)), is_leaf=lambda n: isinstance(n, tuple)
    )
    assert count_parameters(shapes) == PARAMETERS[name]


def test_every_published_config_can_be_written():
    for config in PUBLISHED.values():
        to_hf(config)


def test_traffic_of_a_loop_is_counted_for_every_turn():
    """Five turns of a sum over 8 devices and one gather: a ring sends 2 x 7/8 of what it sums and 7/8 of what it gathers."""
    mesh = make_mesh((1, 8, 1))

    def run(x):
        summed, _ = jax.lax.scan(lambda carry, _: (jax.lax.psum(carry, "fsdp") / 8, None), x, None, length=5)
        return summed, jax.lax.all_gather(x, "fsdp")

    program = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P("fsdp"), out_specs=(P("fsdp"), P(None)), check_vma=False))
    traffic = count_traffic(program.lower(jax.ShapeDtypeStruct((8 * 4096,), jnp.float32)).compile().as_text())
    assert traffic.bytes == {"all-reduce": 5 * 4096 * 4 * 2 * 7 / 8, "all-gather": 8 * 4096 * 4 * 7 / 8}
    assert traffic.largest == 8 * 4096


def question(**changes):
    asked = Question("tiny", TINY, "lora-dpo", RECIPES["lora-dpo"], "v5e:2x2", 8, 32)
    return dataclasses.replace(asked, **changes)


@pytest.fixture
def pod(monkeypatch):
    """256 chips that no compiler has to describe."""
    monkeypatch.setattr(settings_module, "open_topology", lambda *_: ([None] * 256, CHIPS["v5e"]))


def test_the_first_setting_follows_the_rules(pod):
    seven = question(config=find_config("llama-2-7b"), batch=256, length=2048)
    found = first_setting(seven)
    assert (found.mesh, found.remat, found.attention, found.residual) == ((1, 16, 16), "full", "splash", "sequence")
    assert seven.rows == 512
    assert found.microbatches == 2 * first_setting(dataclasses.replace(seven, shared_prompt=True)).microbatches > 1
    assert first_setting(seven, mesh=(1, 256, 1), microbatches=1, remat="dots").mesh == (1, 256, 1)
    window = first_setting(dataclasses.replace(seven, config=find_config("mistral-7b-v0.1"), length=8192, batch=16))
    assert window.attention == "xla"
    assert first_setting(dataclasses.replace(seven, config=find_config("llama-3-8b"), what="decode")).mesh == (1, 32, 8)


def test_neighbours_change_one_thing_and_divide(pod):
    seven = question(config=find_config("llama-2-7b"), batch=256, length=2048)
    begun = first_setting(seven)
    found = dict(neighbours(seven, begun))
    assert "remat dots" in found and "mesh 1 x 8 x 32" in found
    for setting in found.values():
        changed = [f.name for f in dataclasses.fields(begun) if getattr(setting, f.name) != getattr(begun, f.name)]
        assert len(changed) == 1
        assert seven.batch % (setting.mesh[0] * setting.mesh[1] * setting.microbatches) == 0


def test_the_suggestion_is_the_quickest_neighbour_that_fits(pod, monkeypatch):
    """Nothing is suggested that does not fit, or gains less than a twentieth."""
    seven = question(config=find_config("llama-2-7b"), batch=256, length=2048)

    def answer(setting, seconds, fits=True):
        return Answer(setting, fits, 0.0 if fits else 1.0, 0, 0, 0, {}, 0.0, {}, {"links": seconds} if fits else {}, "links", 0, 0.0)

    begun, told = answer(first_setting(seven), 1.0), []
    costs = {"mesh 1 x 32 x 8": (0.8, True), "mesh 1 x 8 x 32": (0.9, True), "remat dots": (0.1, False)}
    for spare in (1.0, 1.2):
        by_setting = {setting: costs.get(name, (1.0, True)) for name, setting in neighbours(seven, begun.setting)}
        monkeypatch.setattr(
            settings_module, "ask", lambda _, setting, by=by_setting, spare=spare: answer(setting, by[setting][0] * spare, by[setting][1])
        )
        found = suggest(seven, begun, told.append)
        assert (found and found[0]) == ("mesh 1 x 32 x 8" if spare == 1.0 else None)
    assert "remat dots" in told and "mesh 1 x 32 x 8" in told


def test_what_does_not_fit_is_read_from_the_compilers_words():
    told = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 25.20G of 15.75G hbm. Exceeded"
    assert shortage(told) == (25.2 * 2**30, 15.75 * 2**30, False)
    other = "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (32.74G) exceeds available HBM (512M)."
    assert shortage(other) == (32.74 * 2**30, 512 * 2**20, True)
    assert shortage(told.replace("RESOURCE_EXHAUSTED", "INTERNAL")) is None


@pytest.mark.parametrize("name", ["v5e", "v5litepod-16", "v9:2x2", "v5e:2"])
def test_a_topology_that_is_none_raises(name):
    with pytest.raises(MeetjaxError, match="plan: topology; expected KIND:AxB"):
        open_topology(name)


def test_without_the_compiler_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(chips_module.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MeetjaxError, match=r"pip install 'meetjax\[plan\]'"):
        open_topology("v5e:2x2")


@pytest.mark.skipif(not HAS_LIBTPU, reason="needs the [plan] extra")
def test_a_step_is_compiled_for_tpu():
    """The numbers of a tiny step, and what cannot be asked."""
    with pytest.raises(MeetjaxError, match="plan: topology v5e:3x5"):
        open_topology("v5e:3x5")
    tiny = question()
    setting = first_setting(tiny)
    assert setting.mesh == (1, 2, 2)
    for changes, what in (
        ({"mesh": (1, 2, 1)}, "plan: mesh; expected a product of 4"),
        ({"base": "int3"}, "plan: base"),
        ({"mesh": (1, 4, 1), "microbatches": 8}, r"train\.batch_size"),
    ):
        with pytest.raises(MeetjaxError, match=what):
            ask(tiny, dataclasses.replace(setting, **changes))
    answer = ask(tiny, setting)
    assert answer.fits and answer.bound in answer.seconds
    assert answer.arguments >= sum(answer.groups.values())  # arrays are filled up to tiles
    assert answer.moved and answer.flops > 0
    told = as_json(tiny, answer, ("base float32", answer))
    assert told["asked"]["rows"] == 16 and told["suggestion"]["change"] == "base float32"
    assert as_table(tiny, answer, ("base float32", answer)).renderables


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"--model": "llama-9"}, "error: plan: model; expected a config.json or one of llama-7b"),
        ({"--recipe": "lora-ppo"}, "error: plan: recipe; expected a .py file or one of lora-dpo"),
        ({"--topology": "v5litepod-16"}, "error: plan: topology; expected KIND:AxB"),
    ],
)
def test_bad_input_gets_one_line(command, changes, what):
    asked = {"--model": "llama-2-7b", "--topology": "v5e:2x2"} | changes
    done = command("plan", *(word for pair in asked.items() for word in pair))
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert done.err.startswith(what)
