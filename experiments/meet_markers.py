"""A control for MEET: the model learns under text markers in place of trained controls (Chain of Hindsight, arXiv 2302.02676).

    meetjax align experiments/meet_markers.py --set data.path=HH.jsonl.gz

HH.jsonl.gz is harmless-base/test.jsonl.gz of Anthropic/hh-rlhf; the default reads the larger train part from the hub. The
markers are those of the released code, put in front of the answer; the loss leaves them out.

Seen: agrees. On HH .501 (.457 to .545) against .578 with trained controls, on the concise set 31 tokens an answer against 24 at as much
drift. With the marker's last blank as a token of its own in front of what is answered, which no row of training has, those were 47 tokens.
"""

from meetjax.objectives.sft import ConditionalSft
from meetjax.train.stage import Data, Evaluation, Optim, Recipe, Stage, Train, View


def get_config() -> Recipe:
    view = View(markers=("An unhelpful answer: ", "A helpful answer: "))
    return Recipe(
        name="meet_markers",
        data=Data(path="Anthropic/hh-rlhf:harmless-base", held_out=500, max_length=256),
        train=Train(steps=200, batch_size=8),
        stages=(Stage(("base",), ConditionalSft(), Optim(learning_rate=1e-5), view),),
        evaluation=Evaluation(prompts=100),
    )
