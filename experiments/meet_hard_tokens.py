"""A control for MEET: one hard token a class in front of the answer (conditional SFT, as in ContextualAI/HALOs).

    meetjax align experiments/meet_hard_tokens.py --set data.path=HH.jsonl.gz

HH.jsonl.gz is harmless-base/test.jsonl.gz of Anthropic/hh-rlhf; the default reads the larger train part from the hub. The
tokens are two that SmolLM2's vocabulary holds and its chat data does not, so that no embedding row is added; their rows train
with the model.

Seen: agrees, behind trained controls: on HH .552 (.507 to .595) for 24 nats where they have .578 for 12, on the concise set 41 tokens
an answer for 25 nats, where they give 24 for 11.
"""

from meetjax.objectives.sft import ConditionalSft
from meetjax.train.stage import Data, Evaluation, Optim, Recipe, Stage, Train, View


def get_config() -> Recipe:
    view = View(markers=("<jupyter_text>", "<jupyter_code>"))
    return Recipe(
        name="meet_hard_tokens",
        data=Data(path="Anthropic/hh-rlhf:harmless-base", held_out=500, max_length=256),
        train=Train(steps=200, batch_size=8),
        stages=(Stage(("base",), ConditionalSft(), Optim(learning_rate=1e-5), view),),
        evaluation=Evaluation(prompts=100),
    )
