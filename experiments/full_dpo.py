"""The whole model by DPO, what adapters are measured against.

    meetjax align experiments/full_dpo.py --set data.path=HH.jsonl.gz

HH.jsonl.gz is harmless-base/test.jsonl.gz of Anthropic/hh-rlhf; the default reads the larger train part from the hub. Rafailov
et al. (2023), arXiv 2305.18290; AdamW at 1e-6, their rate, in place of RMSprop.

Seen: agrees with what DPO promises, a preference for little drift: .630 on HH for 0.09 nats an answer, level with adapters that drift
by 14 and more; on the concise set 45 steps order the answers (1.000) long before they change what is said (1 nat, 110 tokens).
"""

from meetjax.objectives.preference import Dpo
from meetjax.train.stage import Data, Evaluation, Optim, Recipe, Stage, Train


def get_config() -> Recipe:
    return Recipe(
        name="full_dpo",
        data=Data(path="Anthropic/hh-rlhf:harmless-base", held_out=500, max_length=256),
        train=Train(steps=200, batch_size=4),
        stages=(Stage(("base",), Dpo(beta=0.1), Optim(learning_rate=1e-6)),),
        evaluation=Evaluation(prompts=100),
    )
