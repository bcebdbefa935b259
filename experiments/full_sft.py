"""The baseline that every method has to beat: the whole model by SFT on the chosen answers.

    meetjax align experiments/full_sft.py --set data.path=HH.jsonl.gz

HH.jsonl.gz is harmless-base/test.jsonl.gz of Anthropic/hh-rlhf; the default reads the larger train part from the hub.

Seen: agrees, every method but RAHF-SCIT and positives only beats it. On HH .479 (.435 to .523) is nothing; on the concise set .970 at
11 nats and 23 tokens an answer, where the others reach 1.000.
"""

from meetjax.objectives.sft import Sft
from meetjax.train.stage import Data, Evaluation, Optim, Recipe, Stage, Train


def get_config() -> Recipe:
    return Recipe(
        name="full_sft",
        data=Data(path="Anthropic/hh-rlhf:harmless-base", held_out=500, max_length=256),
        train=Train(steps=200, batch_size=8),
        stages=(Stage(("base",), Sft(), Optim(learning_rate=1e-5)),),
        evaluation=Evaluation(prompts=100),
    )
