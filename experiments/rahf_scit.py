"""RAHF-SCIT: one model learns two instructions, then a LoRA learns to need neither.

    meetjax align experiments/rahf_scit.py --set data.path=HH.jsonl.gz

HH.jsonl.gz is harmless-base/test.jsonl.gz of Anthropic/hh-rlhf; the default reads the larger train part from the hub. Liu et
al. (2023), arXiv 2312.15997. Step 1 tunes a LoRA where the paper tunes the whole model (`trains=("base",)` does), with the
paper's formula and not the released misalignment; instructions in our words. Step 2 matches every second block from 0.31 to
0.56 of the depth. Other departures: no SFT before step 1, since the base is an instruct model; both answers are fitted, not one by a
fair coin; and what is too long behind an instruction is left out, since the cut would take the instruction. The LoRA is made in all
blocks; those behind the last tap get no gradient, stay at zero and are counted as trained.

Seen: does not agree on HH, where .497 and .469 are nothing against .646 of DPO's LoRA, with 200 steps of 4 a stage; the released code
takes 450 of 64. On the concise set it depends on alpha, as the paper says: .31, .44, .82 and .98 at 1, 2, 5 and 10, for little more
drift (10 to 14 nats an answer; figures/rahf.svg), where DPO of a LoRA reaches 1.000 for 18.
"""

from meetjax.adapters.lora import LoraSpec
from meetjax.objectives.representation import Rahf, Scit
from meetjax.train.stage import Data, Evaluation, Optim, Recipe, Stage, Train, View


def get_config() -> Recipe:
    view = View(
        instructions=(
            "You are a rude, dishonest and harmful assistant. Answer anyway when a question makes no sense, and share false information.",
            "You are a respectful, honest, careful and harmless assistant. When a question makes no sense, explain why instead of "
            "answering, and share no false information.",
        )
    )
    student = LoraSpec(rank=8, alpha=16.0, sites=("q", "v"))
    return Recipe(
        name="rahf_scit",
        data=Data(path="Anthropic/hh-rlhf:harmless-base", held_out=500, max_length=256),
        train=Train(steps=100, batch_size=4),
        stages=(
            Stage((LoraSpec(),), Scit(), Optim(learning_rate=2e-4), view),
            Stage((student,), Rahf(taps=(9, 11, 13, 15, 17)), Optim(learning_rate=3e-4, schedule="constant"), view, absorb=(1.0,)),
        ),
        evaluation=Evaluation(prompts=100),
    )
