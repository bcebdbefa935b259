"""Recipes: `--set` reaches every field and takes only values of its type; a recipe that cannot run names its field."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import ClassVar

import pytest

from meetjax.adapters.edit import EditSpec
from meetjax.adapters.lora import LoraSpec
from meetjax.adapters.reward import RewardSpec
from meetjax.errors import MeetjaxError
from meetjax.objectives.bounds import bounds_of
from meetjax.objectives.kto import Kto
from meetjax.objectives.preference import Dpo, Ipo
from meetjax.objectives.representation import Rahf
from meetjax.objectives.reward import BradleyTerry
from meetjax.objectives.sft import Sft
from meetjax.objectives.table import OBJECTIVES
from meetjax.train.stage import Data, Optim, Recipe, Stage, Train, check_recipe, override, resolved

RECIPE = Recipe("r", data=Data(path="p.jsonl"), stages=(Stage((LoraSpec(), EditSpec())), Stage(("base",), Sft())))
HEADED = dataclasses.replace(RECIPE, stages=(Stage((LoraSpec(), RewardSpec()), BradleyTerry()), *RECIPE.stages[1:]))

SET = {  # setting -> (path to the value, value)
    "model=org/name": (("model",), "org/name"),
    "out=a=b": (("out",), "a=b"),
    "data.path=none": (("data", "path"), "none"),
    "data.limit=7": (("data", "limit"), 7),
    "data.limit=None": (("data", "limit"), None),
    "data.split=7": (("data", "split"), "7"),
    "data.split=none": (("data", "split"), None),
    "data.template=none": (("data", "template"), "none"),
    "data.buckets=64,128": (("data", "buckets"), (64, 128)),
    "data.buckets=": (("data", "buckets"), ()),
    "train.steps=12": (("train", "steps"), 12),
    "train.mesh=2,2,2": (("train", "mesh"), (2, 2, 2)),
    "train.mesh=(4, 1, 2)": (("train", "mesh"), (4, 1, 2)),
    "train.mesh.1=8": (("train", "mesh", 1), 8),
    "dtype=bfloat16": (("dtype",), "bfloat16"),
    "quantize=int4": (("quantize",), "int4"),
    "stages.0.optim.learning_rate=1e-3": (("stages", 0, "optim", "learning_rate"), 1e-3),
    "stages.0.optim.clip=2": (("stages", 0, "optim", "clip"), 2.0),
    "stages.0.optim.schedule=linear": (("stages", 0, "optim", "schedule"), "linear"),
    "stages.0.objective.beta=0.5": (("stages", 0, "objective", "beta"), 0.5),
    "stages.0.objective=ipo": (("stages", 0, "objective"), Ipo()),
    "stages.1.objective=kto": (("stages", 1, "objective"), Kto()),
    "stages.0.trains.0.rank=4": (("stages", 0, "trains", 0, "rank"), 4),
    "stages.0.trains.1.sites=q,down": (("stages", 0, "trains", 1, "sites"), ("q", "down")),
    "stages.0.trains=base": (("stages", 0, "trains"), ("base",)),
}

REFUSED = {  # setting -> what the message says
    "train.steps": "--set train.steps; expected field=value; found no =",
    "train.steps=1.5": "--set train.steps: value; expected an integer; found '1.5'",
    "train.steps=none": "--set train.steps: value; expected an integer; found 'none'",
    "train.mesh=2,2": "--set train.mesh: value; expected (an integer, an integer, an integer) or single or",
    "train.mesh=2,2,x": "--set train.mesh: value; expected (an integer, an integer, an integer) or single or",
    "train.mesh.3=1": "--set train.mesh.3: index 3; expected 0 to 2; found 3",
    "train.mesh.-1=1": "--set train.mesh.-1: index -1; expected 0 to 2; found -1",
    "train=3": "--set train: value; expected a Train; found '3'",
    "train.speed=3": "--set train.speed: field speed; expected one of steps, batch_size, microbatches, save_every, seed, mesh",
    "train.steps.x=3": "--set train.steps.x: field x; expected one of no further field",
    "data.limit=few": "--set data.limit: value; expected an integer or none; found 'few'",
    "data.template=bogus": "--set data.template: value; expected auto or chat or none; found 'bogus'",
    "dtype=float64": "--set dtype: value; expected float32 or bfloat16; found 'float64'",
    "remat=some": "--set remat: value; expected auto or none or dots or full; found 'some'",
    "stages.0.optim.schedule=step": "--set stages.0.optim.schedule: value; expected cosine or linear or constant; found 'step'",
    "stages.0.optim.learning_rate=nan": "value; expected a finite number; found 'nan'",
    "stages.0.optim.learning_rate=inf": "value; expected a finite number; found 'inf'",
    "stages.0.objective=ppo": "objective: value; expected sft or conditional_sft or dpo or cdpo or robust_dpo or dpo_norm or",
    "stages.0.objective.gamma=1": "field gamma; expected one of beta; found gamma",
    "stages.0.trains.0=lora": "expected a PromptSpec or a LoraSpec or an EditSpec or an IdentitySpec or a RewardSpec or base; found 'lora'",
    "stages.1.trains.0.rank=3": "field rank; expected one of no further field; found rank",
    "stages.2.optim.clip=3": "--set stages.2.optim.clip: index 2; expected 0 to 1; found 2",
}


def at(recipe, path):
    for name in path:
        recipe = recipe[name] if isinstance(name, int) else getattr(recipe, name)
    return recipe


@pytest.mark.parametrize("setting", SET)
def test_override_sets_one_field(setting):
    """The value has the field's type, and nothing else has changed: put back, the recipe is the old one."""
    path, value = SET[setting]
    new = override(RECIPE, [setting])
    assert at(new, path) == value
    assert type(at(new, path)) is type(value)

    def put(node, names, leaf):
        if not names:
            return leaf
        inner = put(at(node, names[:1]), names[1:], leaf)
        if isinstance(node, tuple):
            return (*node[: names[0]], inner, *node[names[0] + 1 :])
        return dataclasses.replace(node, **{names[0]: inner})

    assert put(new, path, at(RECIPE, path)) == RECIPE


def test_overrides_apply_in_order():
    assert override(RECIPE, ["train.steps=3", "train.seed=4", "train.steps=5"]).train == Train(steps=5, seed=4)


@pytest.mark.parametrize("setting", REFUSED)
def test_override_refuses(setting):
    with pytest.raises(MeetjaxError) as caught:
        override(RECIPE, [setting])
    assert REFUSED[setting] in str(caught.value)


WRONG = {  # change -> what the message says
    "data.path=": "recipe: data.path is empty; give a file or hub id",
    "data.columns=text": "recipe: data.columns; expected names of prompt and completion, or (); found ('text',)",
    "quantize=int8": "recipe: stages.1.trains: base; expected quantize=none, for integers do not train; found int8",
    "train.steps=0": "recipe: train.steps; expected >= 1; found 0",
    "train.batch_size=0": "recipe: train.batch_size; expected >= 1; found 0",
    "train.microbatches=3": "recipe: train.microbatches; expected a divisor of train.batch_size = 8; found 3",
    "train.save_every=0": "recipe: train.save_every; expected >= 1; found 0",
    "train.seed=-1": "recipe: train.seed; expected 0 to 2^32 - 1; found -1",
    "data.seed=-1": "recipe: data.seed; expected 0 to 2^32 - 1; found -1",
    "data.held_out=-1": "recipe: data.held_out; expected >= 0; found -1",
    "data.max_length=7": "recipe: data.max_length; expected >= 8; found 7",
    "data.limit=0": "recipe: data.limit; expected >= 1; found 0",
    "data.buckets=128,64": "recipe: data.buckets; expected ascending lengths, or () for the best; found (128, 64)",
    "stages.0.optim.learning_rate=0": "recipe: stages.0.optim.learning_rate; expected > 0; found 0.0",
    "stages.0.optim.learning_rate=-1e-3": "recipe: stages.0.optim.learning_rate; expected > 0; found -0.001",
    "stages.1.optim.warmup=1.5": "recipe: stages.1.optim.warmup; expected a fraction, 0 to 1; found 1.5",
    "stages.0.optim.weight_decay=-1": "recipe: stages.0.optim.weight_decay; expected >= 0; found -1.0",
    "stages.0.optim.clip=-1": "recipe: stages.0.optim.clip; expected >= 0; found -1.0",
    "stages.0.optim.b1=1": "recipe: stages.0.optim.b1; expected at least 0 and less than 1; found 1.0",
    "stages.0.optim.b2=-0.1": "recipe: stages.0.optim.b2; expected at least 0 and less than 1; found -0.1",
    "stages.0.objective.beta=0": "recipe: stages.0.objective.beta; expected > 0; found 0.0",
    "stages.1.objective=bradley_terry": "recipe: stages.1.trains; expected RewardSpec() here or in an earlier stage",
    "stages.1.trains=": "recipe: stages.1.trains: zero trainable leaves; expected base or some of prompt, lora, edit, identity",
}


def test_a_good_recipe_passes():
    check_recipe(RECIPE)


def test_a_reward_head_of_an_earlier_stage_will_do():
    check_recipe(override(HEADED, ["stages.1.objective=bradley_terry"]))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("stages.0.objective=dpo", "recipe: stages.0.trains; expected what Dpo reads; found RewardSpec(), which gets no gradient from it"),
        ("stages.1.absorb=1", "recipe: stages.1.absorb; expected lora or edit alone trained before, to be merged; found reward"),
    ],
)
def test_a_reward_head_must_be_read_and_stays_apart(change, told):
    with pytest.raises(MeetjaxError) as caught:
        check_recipe(override(HEADED, [change]))
    assert told in str(caught.value)


def test_a_later_stage_goes_on_with_what_an_earlier_one_made():
    """A spec that differs would be ignored; after `absorb` the kind is made anew."""
    made, other = LoraSpec(rank=4), LoraSpec(rank=8)
    for again in (Stage((made, EditSpec())), Stage((other,), absorb=(1.0,))):
        check_recipe(dataclasses.replace(RECIPE, stages=(Stage((made,)), again)))
    with pytest.raises(MeetjaxError, match=r"recipe: stages\.1\.trains: lora; expected LoraSpec\(rank=4.*found LoraSpec\(rank=8"):
        check_recipe(dataclasses.replace(RECIPE, stages=(Stage((made,)), Stage((other,)))))


@pytest.mark.parametrize("change", WRONG)
def test_check_recipe_names_the_field(change):
    with pytest.raises(MeetjaxError) as caught:
        check_recipe(override(RECIPE, [change]))
    assert WRONG[change] in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        (dataclasses.replace(RECIPE, stages=()), "recipe: stages; expected at least one; found none"),
        (dataclasses.replace(RECIPE, stages=Stage()), "recipe: stages; expected any number of: a Stage; found Stage("),
        (dataclasses.replace(RECIPE, dtype="float16"), "recipe: dtype; expected float32 or bfloat16; found 'float16'"),
        (dataclasses.replace(RECIPE, train=Train(steps=True)), "recipe: train.steps; expected an integer; found True"),
        (dataclasses.replace(RECIPE, train=Train(mesh=(1, 1))), "recipe: train.mesh; expected (an integer, an integer, an integer)"),
        (dataclasses.replace(RECIPE, train=Train(mesh=(1, "1", 1))), "recipe: train.mesh.1; expected an integer; found '1'"),
        (dataclasses.replace(RECIPE, data=Data(path=None)), "recipe: data.path; expected text; found None"),
        (dataclasses.replace(RECIPE, stages=(Stage(("lora",)),)), "recipe: stages.0.trains.0; expected a PromptSpec or"),
        (dataclasses.replace(RECIPE, stages=(Stage([LoraSpec()]),)), "recipe: stages.0.trains; expected any number of: a PromptSpec or"),
        (dataclasses.replace(RECIPE, stages=(Stage((LoraSpec(sites=("q", 3)),)),)), "stages.0.trains.0.sites.1; expected text; found 3"),
        (
            dataclasses.replace(RECIPE, stages=(Stage(optim=Optim(clip=math.nan)),)),
            "stages.0.optim.clip; expected a finite number; found nan",
        ),
        (
            dataclasses.replace(RECIPE, stages=(Stage(objective=Rahf(asks=("plain", "best"))),)),
            "objective.asks.1; expected plain or own or",
        ),
        (dataclasses.replace(RECIPE, stages=(Stage(objective=Dpo),)), "stages.0.objective; expected an Objective; found <class"),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
def test_check_recipe_reads_types(recipe, told):
    """A recipe from a file is as typed as one from the command line."""
    with pytest.raises(MeetjaxError) as caught:
        check_recipe(recipe)
    assert told in str(caught.value)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_checks_its_numbers(name):
    """Each float below its bound is refused by its path; at its default all pass, and each objective says what it reads."""
    recipe = override(HEADED if getattr(OBJECTIVES[name], "reads_rewards", False) else RECIPE, [f"stages.0.objective={name}"])
    check_recipe(recipe)
    objective = recipe.stages[0].objective
    assert objective == OBJECTIVES[name]()
    assert objective.form in ("pair", "completion", "labelled", "edited")
    assert (objective.form == "labelled") == hasattr(objective, "partners")
    numbers = [field.name for field in dataclasses.fields(objective) if field.type in ("int", "float")]
    assert numbers == [bound[0] for bound in bounds_of(objective)]
    for field in numbers:
        with pytest.raises(MeetjaxError, match=rf"^recipe: stages\.0\.objective\.{field}; expected .*; found -1"):
            check_recipe(override(recipe, [f"stages.0.objective.{field}=-1"]))


@pytest.mark.parametrize("name", ["cdpo", "robust_dpo"])
def test_half_the_pairs_swapped_is_refused(name):
    recipe = override(RECIPE, [f"stages.0.objective={name}", "stages.0.objective.epsilon=0.5"])
    with pytest.raises(MeetjaxError, match=r"epsilon; expected at least 0 and less than 0\.5; found 0\.5"):
        check_recipe(recipe)
    check_recipe(override(recipe, ["stages.0.objective.epsilon=0"]))


def test_an_objective_of_ones_own_passes():
    """A new paper is a file in experiments/."""

    @dataclasses.dataclass(frozen=True)
    class Hinge:
        margin: float = 1.0
        form: ClassVar[str] = "pair"
        needs_reference: ClassVar[bool] = False

        def __call__(self, logps, batch):
            raise NotImplementedError

    recipe = override(dataclasses.replace(RECIPE, stages=(Stage(objective=Hinge()),)), [])
    check_recipe(recipe)
    assert resolved(recipe)["stages"][0]["objective"] == {"type": "Hinge", "margin": 1.0}


def test_resolved_is_plain_and_names_every_variant():
    """JSON and back is the same, so that a stored recipe can be compared; every field is in it, defaults too."""
    plain = resolved(RECIPE)
    assert json.loads(json.dumps(plain)) == plain
    assert plain["stages"][0]["trains"][0] == {"type": "LoraSpec", "rank": 16, "alpha": 32.0, "sites": list(LoraSpec().sites)}
    assert plain["stages"][1]["trains"] == ["base"]
    assert plain["stages"][1]["objective"] == {"type": "Sft"}
    assert resolved(override(RECIPE, ["stages.1.optim.b1=0.8"])) != plain
