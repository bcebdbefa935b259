"""A Bradley-Terry reward model: LoRA on q and v and a head on the last token, 922,176 parameters.

    meetjax align experiments/reward_model.py --set data.path=HH.jsonl.gz

HH.jsonl.gz is harmless-base/test.jsonl.gz of Anthropic/hh-rlhf; the default reads the larger train part from the hub. The held-out
accuracy is that of the rewards. They are centred as in Eisenstein et al. (2023), arXiv 2312.09244, eq. 2, with its weight 0.01.

Seen: agrees. Rewards order .614 (.571 to .656) of the held-out pairs, above the shorter answer (.539) and untrained log-probabilities
(.549), and no better than the implicit reward of DPO with the same data (.602 after as many steps).
"""

from meetjax.adapters.lora import LoraSpec
from meetjax.adapters.reward import RewardSpec
from meetjax.objectives.reward import BradleyTerry
from meetjax.train.stage import Data, Optim, Recipe, Stage, Train


def get_config() -> Recipe:
    trains = (LoraSpec(rank=16, sites=("q", "v")), RewardSpec())
    return Recipe(
        name="reward_model",
        data=Data(path="Anthropic/hh-rlhf:harmless-base", held_out=500, max_length=256),
        train=Train(steps=200, batch_size=4),
        stages=(Stage(trains, BradleyTerry(kappa=0.01), Optim(learning_rate=1e-4)),),
    )
