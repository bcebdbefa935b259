"""The objectives by name, as `--set stages.0.objective=ipo` gives them."""

from __future__ import annotations

from typing import Any

from meetjax.objectives.figa import Figa
from meetjax.objectives.kto import ApoZeroUnpaired, Kto
from meetjax.objectives.preference import ApoDown, ApoZero, Cdpo, Dpo, Hinge, Ipo, NormalizedDpo, RobustDpo
from meetjax.objectives.reference_free import Cpo, Orpo, Simpo
from meetjax.objectives.representation import Rahf, Scit
from meetjax.objectives.reward import BradleyTerry
from meetjax.objectives.sft import ConditionalSft, Sft

OBJECTIVES: dict[str, type[Any]] = {
    "sft": Sft,
    "conditional_sft": ConditionalSft,
    "dpo": Dpo,
    "cdpo": Cdpo,
    "robust_dpo": RobustDpo,
    "dpo_norm": NormalizedDpo,
    "ipo": Ipo,
    "hinge": Hinge,
    "apo_zero": ApoZero,
    "apo_down": ApoDown,
    "orpo": Orpo,
    "simpo": Simpo,
    "cpo": Cpo,
    "bradley_terry": BradleyTerry,
    "kto": Kto,
    "apo_zero_unpaired": ApoZeroUnpaired,
    "figa": Figa,
    "scit": Scit,
    "rahf": Rahf,
}
