"""CLM: one identity block by DPO on Anthropic HH harmless: 3,540,096 parameters.

    meetjax align experiments/identity_dpo_hh.py --set data.path=HH.jsonl.gz

Data and split as in edit_dpo_hh.py. Zhu et al. (2025), arXiv 2503.04346, take beta .001 to .005 and
rates of 5e-7 to 5e-6 on models of 3B and more; here beta is .1, as in the other DPO recipes of the table, to compare them.

Seen: agrees. One block in front of a frozen model learns the preference (1.000 on the concise set, .608 and .614 on HH under two seeds)
and drifts least of all adapters: 1.5 to 1.7 nats an answer on HH, a tenth of LoRA's. At the rates that adapters like it ruins the
language first (201 nats at 5e-5 on the concise set); the paper's 5e-6 on 3B models says the same: all of a layer's weights move here.
Its dial agrees too: from lambda -1 to 2 the margin rises and answers shorten at every step (figures/clm.svg).
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
