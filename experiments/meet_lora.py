"""MEET with control LoRAs: good and bad learn a LoRA each on the frozen model, then the model learns under both.

    meetjax align experiments/meet_lora.py --set data.path=HH.jsonl.gz

HH.jsonl.gz is harmless-base/test.jsonl.gz of Anthropic/hh-rlhf; the default reads the larger train part from the hub. Xue et
al. (2023), arXiv 2310.00819; as meet_prompt.py, with the row's class selecting its low-rank update.

Seen: agrees, as meet_prompt.py does: .600 and .560 on HH under two seeds, and the least drift of all MEET runs on the concise set (9.1
nats an answer, 27 tokens). The paper has both kinds and no order between them; nor do we see one (.578).
"""

from meetjax.adapters.lora import LoraSpec
from meetjax.objectives.sft import ConditionalSft
from meetjax.train.stage import Data, Evaluation, Optim, Recipe, Stage, Train, View


def get_config() -> Recipe:
    controls = LoraSpec(rank=8, alpha=16.0, sites=("q", "v"))
    view = View(controls=2)
    return Recipe(
        name="meet_lora",
        data=Data(path="Anthropic/hh-rlhf:harmless-base", held_out=500, max_length=256),
        train=Train(steps=100, batch_size=8),
        stages=(
            Stage((controls,), ConditionalSft(per_class=True), Optim(learning_rate=2e-4), view),
            Stage(("base", controls), ConditionalSft(), Optim(learning_rate=2e-5, base_learning_rate=1e-5), view),
        ),
        evaluation=Evaluation(prompts=100),
    )
