"""The trade-off study in small: SFT against DPO, by adapter kind, rank and seed, on two sets.

    meetjax grid experiments/tradeoffs.py --set train.steps=200

Thakkar et al. (2024), arXiv 2406.04879, vary method, data, model and LoRA against QLoRA, each method with an adapter shape and rate of
its own. Here every cell of a kind has the same sites, rank and rate, so that the method's effect is its own (their pair of presets
confounds the two); "qlora" is the same LoRA on a base in int8. HH is the 2,312-row harmless test part when
given as `data`; "concise" comes with the package.

Seen, on "concise" alone, seed 0, 45 steps, ranks 4 and 16 (`--only data=concise --only seed=0 --only rank=4,16 --set train.steps=45`):
agrees where it can tell. LoRA and QLoRA are about equal (10.0 and 10.4 nats an answer for SFT, 20.9 and 21.7 for DPO), as the paper has
it; rank, of which it prints nothing, changes how far a model goes and not whether it learns (7.1 and 10.0, 12.2 and 20.9 nats at ranks 4
and 16). DPO moves each kind further than SFT, to longer answers (33 to 82 tokens against 23 to 37). That DPO suits an instruct model better
than SFT shows on HH (README: LoRA by DPO .646, the whole model by SFT .479); here all reach .98 to 1.00.
"""

from meetjax.adapters.edit import EditSpec
from meetjax.adapters.lora import LoraSpec
from meetjax.objectives.preference import Dpo
from meetjax.objectives.sft import Sft
from meetjax.train.stage import Data, Evaluation, Optim, Recipe, Stage, Train

AXES = {"objective": ("sft", "dpo"), "data": ("concise", "hh"), "kind": ("lora", "qlora", "edit"), "rank": (4, 16, 64), "seed": (0, 1)}
SETS = {
    "concise": Data(path="concise", held_out=60, max_length=192),
    "hh": Data(path="Anthropic/hh-rlhf:harmless-base", held_out=500, max_length=256),
}


def get_config(objective: str, data: str, kind: str, rank: int, seed: int) -> Recipe | None:
    """The recipe of a cell; None where an edit would have a rank, and for QLoRA but in the middle."""
    if (kind == "edit" and rank != AXES["rank"][0]) or (kind == "qlora" and rank != 16):
        return None
    spec = EditSpec() if kind == "edit" else LoraSpec(rank=rank, alpha=2.0 * rank)
    loss = Sft() if objective == "sft" else Dpo(beta=0.1)
    return Recipe(
        name="tradeoffs",
        data=SETS[data],
        train=Train(steps=200, batch_size=4, seed=seed),
        quantize="int8" if kind == "qlora" else "none",
        stages=(Stage((spec,), loss, Optim(learning_rate=1e-3 if kind == "edit" else 2e-4)),),
        evaluation=Evaluation(prompts=50),
    )
