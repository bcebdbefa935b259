"""A control for MEET: stage 2 by DPO under the good control, the reference being what stage 1 left.

    meetjax align experiments/meet_dpo.py --set data.path=HH.jsonl.gz

HH.jsonl.gz is harmless-base/test.jsonl.gz of Anthropic/hh-rlhf; the default reads the larger train part from the hub. Our
design: both answers of a pair are scored under the good control, so what moves is the model and the good control.

Seen: no paper has it. DPO goes further than likelihood from the same stage 1, and drifts: .606 for 34 nats on HH (.578 for 12), 8
tokens an answer and 22.6 nats on the concise set.
"""

from meetjax.adapters.prompt import PromptSpec
from meetjax.objectives.preference import Dpo
from meetjax.objectives.sft import ConditionalSft
from meetjax.train.stage import Data, Evaluation, Optim, Recipe, Stage, Train, View


def get_config() -> Recipe:
    controls = PromptSpec(length=20, text=("An unhelpful answer:", "A helpful answer:"))
    return Recipe(
        name="meet_dpo",
        data=Data(path="Anthropic/hh-rlhf:harmless-base", held_out=500, max_length=256),
        train=Train(steps=200, batch_size=4),
        stages=(
            Stage((controls,), ConditionalSft(per_class=True), Optim(learning_rate=1e-2), View(controls=2)),
            Stage(("base", controls), Dpo(beta=0.1), Optim(1e-3, base_learning_rate=1e-5), View(gates=((0.0, 1.0),)), reference="start"),
        ),
        evaluation=Evaluation(prompts=100),
    )
