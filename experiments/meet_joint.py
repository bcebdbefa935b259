"""A control for MEET: controls and model trained together from the start, in one stage of as many steps.

    meetjax align experiments/meet_joint.py --set data.path=HH.jsonl.gz

HH.jsonl.gz is harmless-base/test.jsonl.gz of Anthropic/hh-rlhf; the default reads the larger train part from the hub. The
paper's claim is that a tiny control beside a large model is starved of signal; here it is tried.

Seen: agrees in direction on HH, .545 (.501 to .589) against .578 for two stages, intervals overlap; not on the concise set, where one
stage does what two do (1.000, 10.7 nats and 23 tokens an answer, 11.3 and 24): a difference of length is one that a control finds at
once.
"""

from meetjax.adapters.prompt import PromptSpec
from meetjax.objectives.sft import ConditionalSft
from meetjax.train.stage import Data, Evaluation, Optim, Recipe, Stage, Train, View


def get_config() -> Recipe:
    controls = PromptSpec(length=20, text=("An unhelpful answer:", "A helpful answer:"))
    view = View(controls=2)
    return Recipe(
        name="meet_joint",
        data=Data(path="Anthropic/hh-rlhf:harmless-base", held_out=500, max_length=256),
        train=Train(steps=200, batch_size=8),
        stages=(Stage(("base", controls), ConditionalSft(), Optim(learning_rate=1e-2, base_learning_rate=1e-5), view),),
        evaluation=Evaluation(prompts=100),
    )
