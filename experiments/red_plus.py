"""RED+ by DPO: scale and bias on five places of a layer, 126,720 parameters.

    meetjax align experiments/red_plus.py --set data.path=HH.jsonl.gz

HH.jsonl.gz is harmless-base/test.jsonl.gz of Anthropic/hh-rlhf; the default reads the larger train part from the hub. Wu et al.
(2024), arXiv 2402.15179: q, k, v, attention output and FFN output. The paper trains by SFT; DPO is our choice.

Seen: does not agree, RED+ is not better than RED: .624 and .612 on HH against .628 and .632, at as much drift; 31 nats and 39 tokens an
answer on the concise set against 25 and 25, both 1.000. It runs at a fifth of RED's rate; the paper chose rates for each.
"""

from meetjax.adapters.edit import EditSpec
from meetjax.models.sites import EDITABLE
from meetjax.objectives.preference import Dpo
from meetjax.train.stage import Data, Evaluation, Optim, Recipe, Stage, Train


def get_config() -> Recipe:
    return Recipe(
        name="red_plus",
        data=Data(path="Anthropic/hh-rlhf:harmless-base", held_out=500, max_length=256),
        train=Train(steps=200, batch_size=4),
        stages=(Stage((EditSpec(sites=EDITABLE),), Dpo(beta=0.1), Optim(learning_rate=1e-3)),),
        evaluation=Evaluation(prompts=100),
    )
