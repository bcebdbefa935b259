"""MEET with control prompts: good and bad learn a soft prompt each on the frozen model, then the model learns under both.

    meetjax align experiments/meet_prompt.py --set data.path=HH.jsonl.gz

HH.jsonl.gz is harmless-base/test.jsonl.gz of Anthropic/hh-rlhf; the default reads the larger train part from the hub. Xue et
al. (2023), arXiv 2310.00819: stage 1 maximises the likelihood of each class under its own control, stage 2 that of both under
model and controls. The paper's settings are not public; all numbers here are our choice (at a rate of 1e-3 a prompt of this
model stands still). Held-out accuracy is of the contrast: s under the good control less s under the bad one.

Seen: agrees. On HH .578 (.534 to .621) and .568 under two seeds, ahead of positives only (.483), markers (.501), joint training (.545)
and hard tokens (.552), though the nearest of them overlap, and level with stage 1 alone (.570). DPO's adapters reach .61 to .65 on fewer
rows: likelihood pays for all of an answer's words alike. On the concise set the second stage shortens answers from 33 tokens
(meet_stage1.py) to 24 at little more drift, as the paper's ablation says; accuracy cannot tell there, since all reach 1.000.
"""

from meetjax.adapters.prompt import PromptSpec
from meetjax.objectives.sft import ConditionalSft
from meetjax.train.stage import Data, Evaluation, Optim, Recipe, Stage, Train, View


def get_config() -> Recipe:
    controls = PromptSpec(length=20, text=("An unhelpful answer:", "A helpful answer:"))
    view = View(controls=2)
    return Recipe(
        name="meet_prompt",
        data=Data(path="Anthropic/hh-rlhf:harmless-base", held_out=500, max_length=256),
        train=Train(steps=100, batch_size=8),
        stages=(
            Stage((controls,), ConditionalSft(per_class=True), Optim(learning_rate=1e-2), view),
            Stage(("base", controls), ConditionalSft(), Optim(learning_rate=1e-3, base_learning_rate=1e-5), view),
        ),
        evaluation=Evaluation(prompts=100),
    )
