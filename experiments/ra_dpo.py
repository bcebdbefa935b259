"""RA-DPO: each answer is the preferred one under a prompt that asks for its own score; at the end the best score is asked for.

    meetjax align experiments/ra_dpo.py --set data.path=ULTRAFEEDBACK.jsonl.gz --set data.split=none

ULTRAFEEDBACK.jsonl.gz has prompt, chosen, rejected, score_chosen and score_rejected; the default reads them from the hub. Zhang et al.
(2024), arXiv 2410.08067: N scored pairs become 2N. The wording of the request is ours. Held-out pairs ask for the highest score. The
paper trains the whole model at beta .01; a LoRA at .1 is our choice, and prompts too long for their request are left out.

Seen: does not agree, and hardly could. After 60 steps of 4 on the 267 rows of 1,000 of UltraFeedback whose answers fit 384 tokens with
their prompts, .448 (.284 to .625) of the 29 held-out pairs that fit are ordered as their scores, by length .379, and the model has not
moved (0.1 nats an answer). The paper trains models of 7B and more on tens of thousands of pairs; two pairs a row with opposite
preferences also cancel until a model reads the score that is asked for, and 240 of them are too few for that.
"""

from meetjax.adapters.lora import LoraSpec
from meetjax.objectives.preference import Dpo
from meetjax.train.stage import Data, Evaluation, Optim, Recipe, Stage, Train, View


def get_config() -> Recipe:
    view = View(goal="Give an answer that a strict reader would score {score:g} out of 10.")
    data = Data(path="HuggingFaceH4/ultrafeedback_binarized", split="train_prefs", form="scored", held_out=100, max_length=512)
    return Recipe(
        name="ra_dpo",
        data=data,
        train=Train(steps=200, batch_size=4),
        stages=(Stage((LoraSpec(rank=16, alpha=32.0, sites=("q", "v")),), Dpo(beta=0.1), Optim(learning_rate=2e-4), view),),
        evaluation=Evaluation(prompts=100),
    )
