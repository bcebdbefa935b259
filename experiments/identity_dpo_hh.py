"""CLM: one identity block by DPO on Anthropic HH harmless: 3,540,096 parameters.

    meetjax align experiments/identity_dpo_hh.py --set data.path=HH.jsonl.gz

Data and split as in edit_dpo_hh.py.
"""

from meetjax.adapters.identity import IdentitySpec
from meetjax.objectives.preference import Dpo
from meetjax.train.stage import Data, Evaluation, Optim, Recipe, Stage, Train


def get_config() -> Recipe:
    return Recipe(
        name="identity_dpo_hh",
        data=Data(path="Anthropic/hh-rlhf:harmless-base", held_out=500, max_length=256),
        train=Train(steps=200, batch_size=4),
        stages=(Stage((IdentitySpec(),), Dpo(beta=0.1), Optim(learning_rate=1e-5)),),
        evaluation=Evaluation(prompts=100),
    )
