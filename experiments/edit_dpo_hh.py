"""RED by DPO on Anthropic HH harmless: two vectors a layer, 34,560 parameters.

    meetjax align experiments/edit_dpo_hh.py --set data.path=HH.jsonl.gz

HH.jsonl.gz is harmless-base/test.jsonl.gz of Anthropic/hh-rlhf (2,312 rows), which the measured numbers used; the default reads
the larger train part from the hub. 500 prompts are held out, split by numpy's default_rng(0). Wu et al. (2024), arXiv 2402.15179,
train by SFT; DPO and its rate, found on this model, are our choice.

Seen: agrees with the paper's direction. 141 times fewer numbers than LoRA prefer as well as it does on HH (.628 and .632 against .646
and .642, intervals overlap), for twice its drift (29 to 35 nats an answer against 14 to 18). It can be dialled: figures/red.svg.
"""

from meetjax.adapters.edit import EditSpec
from meetjax.objectives.preference import Dpo
from meetjax.train.stage import Data, Evaluation, Optim, Recipe, Stage, Train


def get_config() -> Recipe:
    return Recipe(
        name="edit_dpo_hh",
        data=Data(path="Anthropic/hh-rlhf:harmless-base", held_out=500, max_length=256),
        train=Train(steps=200, batch_size=4),
        stages=(Stage((EditSpec(),), Dpo(beta=0.1), Optim(learning_rate=5e-3)),),
        evaluation=Evaluation(prompts=100),
    )
