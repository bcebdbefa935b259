"""A control for MEET: stage 1 alone, control prompts on the model as it is.

    meetjax align experiments/meet_stage1.py --set data.path=HH.jsonl.gz

HH.jsonl.gz is harmless-base/test.jsonl.gz of Anthropic/hh-rlhf; the default reads the larger train part from the hub. What the
second stage adds is meet_prompt.py less this.

Seen: agrees on the concise set, where stage 1 alone changes less (33 tokens an answer, 24 after stage 2). On HH it does not: .570 (.526
to .613) is all that both stages reach (.578).
"""

from meetjax.adapters.prompt import PromptSpec
from meetjax.objectives.sft import ConditionalSft
from meetjax.train.stage import Data, Evaluation, Optim, Recipe, Stage, Train, View


def get_config() -> Recipe:
    controls = PromptSpec(length=20, text=("An unhelpful answer:", "A helpful answer:"))
    view = View(controls=2)
    return Recipe(
        name="meet_stage1",
        data=Data(path="Anthropic/hh-rlhf:harmless-base", held_out=500, max_length=256),
        train=Train(steps=200, batch_size=8),
        stages=(Stage((controls,), ConditionalSft(per_class=True), Optim(learning_rate=1e-2), view),),
        evaluation=Evaluation(prompts=100),
    )
