"""RAHF-Dual: a good and a bad model, as two LoRAs on one base, and a LoRA that moves the good one away from the bad.

    meetjax align experiments/rahf_dual.py --set data.path=HH.jsonl.gz

HH.jsonl.gz is harmless-base/test.jsonl.gz of Anthropic/hh-rlhf; the default reads the larger train part from the hub. Liu et
al. (2023), arXiv 2312.15997. The two models are control LoRAs trained side by side, each on its own class, where the paper
tunes two copies of the model; the good one is merged into the base before step 2, and the bad one is seen as their difference. Other
departures: no SFT before step 1, since the base is an instruct model; its loss is on answers, where the released code takes all tokens;
all of an answer's tokens are matched, not the first 64, since ours are short; and at 3e-4, for fewer steps than the code's 9e-6. The
LoRA is made in all blocks; those behind the last tap get no gradient, stay at zero and are counted as trained.

Seen: agrees. It is ahead of SCIT everywhere, as in the paper, and near DPO: .610 and .580 on HH, .646 and .642 for DPO of a LoRA, at as
much drift; on the concise set level with it (1.000) and further along (10 tokens an answer against 26) at less drift (15 nats against
18).
"""

from meetjax.adapters.lora import LoraSpec
from meetjax.objectives.representation import Rahf
from meetjax.objectives.sft import ConditionalSft
from meetjax.train.stage import Data, Evaluation, Optim, Recipe, Stage, Train, View


def get_config() -> Recipe:
    student = LoraSpec(rank=8, alpha=16.0, sites=("q", "v"))
    fit = Rahf(taps=(9, 11, 13, 15, 17, 19), asks=("plain",), looks=((0, ()), (0, ()), (0, (1.0, -1.0))))
    return Recipe(
        name="rahf_dual",
        data=Data(path="Anthropic/hh-rlhf:harmless-base", held_out=500, max_length=256),
        train=Train(steps=100, batch_size=8),
        stages=(
            Stage((LoraSpec(),), ConditionalSft(per_class=True), Optim(learning_rate=2e-4), View(controls=2)),
            Stage((student,), fit, Optim(learning_rate=3e-4, schedule="constant"), absorb=(0.0, 1.0)),
        ),
        evaluation=Evaluation(prompts=100),
    )
