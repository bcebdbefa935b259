"""A control for MEET: both stages on good answers only, so that nothing says what is bad.

    meetjax align experiments/meet_positives.py --set data.path=HH.jsonl.gz

HH.jsonl.gz is harmless-base/test.jsonl.gz of Anthropic/hh-rlhf; the default reads the larger train part from the hub. There is
no bad control to contrast with: held-out accuracy compares with the loaded model.

Seen: agrees on HH, where what tells the answers apart comes from the bad class (.483 without it, .578 with it); on the concise set it
adds little (.980, 24 tokens): good answers alone already say "short".
"""

from meetjax.adapters.prompt import PromptSpec
from meetjax.objectives.sft import ConditionalSft
from meetjax.train.stage import Data, Evaluation, Optim, Recipe, Stage, Train, View


def get_config() -> Recipe:
    control = PromptSpec(length=20, text="A helpful answer:")
    view = View(keep=(1,))
    return Recipe(
        name="meet_positives",
        data=Data(path="Anthropic/hh-rlhf:harmless-base", held_out=500, max_length=256),
        train=Train(steps=100, batch_size=8),
        stages=(
            Stage((control,), ConditionalSft(), Optim(learning_rate=1e-2), view),
            Stage(("base", control), ConditionalSft(), Optim(learning_rate=1e-3, base_learning_rate=1e-5), view),
        ),
        evaluation=Evaluation(prompts=100),
    )
