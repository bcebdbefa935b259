"""A soft prompt by DPO on Anthropic HH harmless: 20 vectors, 11,520 parameters.

    meetjax align experiments/prompt_dpo_hh.py --set data.path=HH.jsonl.gz

Data and split as in edit_dpo_hh.py. The prompt's start is not neutral, so the first loss is not ln 2.

Seen: no paper here trains a prompt by DPO, and it is the worst way to spend the same steps: .545 (.501 to .589) on HH; the concise set
is told apart (1.000) while answers grow longer and drift by 103 nats.
"""

from meetjax.adapters.prompt import PromptSpec
from meetjax.objectives.preference import Dpo
from meetjax.train.stage import Data, Evaluation, Optim, Recipe, Stage, Train


def get_config() -> Recipe:
    return Recipe(
        name="prompt_dpo_hh",
        data=Data(path="Anthropic/hh-rlhf:harmless-base", held_out=500, max_length=256),
        train=Train(steps=200, batch_size=4),
        stages=(Stage((PromptSpec(length=20, text="A helpful answer:"),), Dpo(beta=0.1), Optim(learning_rate=1e-2)),),
        evaluation=Evaluation(prompts=100),
    )
