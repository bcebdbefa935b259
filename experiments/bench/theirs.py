"""trl + peft + transformers, told to train on given batches: `python theirs.py FOLDER TASK DTYPE VARIANT`.

FOLDER holds the model, `rows-dpo.json` and `rows-sft.json` (prompt and answers as token ids) and the LoRA to start from. TASK is dpo, sft
or generate. VARIANT is a comma-separated set of: precompute (reference log-probabilities ahead of training), pure (weights in DTYPE and
no autocast), halved (a batch in two parts, whose gradients add up), checkpointed (activations of layers are recomputed, trl's default).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import transformers
import trl
from safetensors.torch import load_file
from torch.utils.data import SequentialSampler
from worker import serve

FOLDER, TASK, DTYPE, VARIANT = Path(sys.argv[1]), sys.argv[2], sys.argv[3], set(sys.argv[4].split(","))
ROWS = json.loads((FOLDER / f"rows-{'sft' if TASK == 'sft' else 'dpo'}.json").read_text())
BF16, CUDA = DTYPE == "bfloat16", torch.cuda.is_available()


class Clock(transformers.TrainerCallback):
    """Seconds of each step, from its first forward pass to the end of its update."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begun = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if CUDA:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.begun)


TOKENIZER = transformers.AutoTokenizer.from_pretrained(FOLDER / "model")
MODEL = transformers.AutoModelForCausalLM.from_pretrained(FOLDER / "model", dtype=torch.bfloat16 if BF16 else torch.float32)
if TASK == "generate":
    MODEL = MODEL.eval().to("cuda" if CUDA else "cpu")
LORA = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0, bias="none", task_type="CAUSAL_LM")


def train(batches: list[list[int]], learning_rate: float) -> dict[str, Any]:
    """{"seconds": of each step, "losses", "reference": seconds spent on the reference ahead} of training on these rows, in this order.

    The trainer wraps the model itself: its reference is then the model without adapters, the cheapest one it knows.
    """
    parts = 2 if "halved" in VARIANT else 1
    common = {
        "output_dir": str(FOLDER / "out"), "use_cpu": not CUDA, "bf16": BF16 and "pure" not in VARIANT,
        "gradient_checkpointing": "checkpointed" in VARIANT, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "max_length": None, "dataloader_pin_memory": False,
        "per_device_train_batch_size": len(batches[0]) // parts, "gradient_accumulation_steps": parts,
        "num_train_epochs": 1, "logging_steps": 1, "learning_rate": learning_rate,
        "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 1.0, "remove_unused_columns": False,
    }  # fmt: skip
    rows = [ROWS[n] for batch in batches for n in batch]
    if TASK == "dpo":
        kind, config = trl.DPOTrainer, trl.DPOConfig(**common, beta=0.1, precompute_ref_log_probs="precompute" in VARIANT)
    else:
        rows = [
            {
                "input_ids": row["prompt_ids"] + row["chosen_ids"],
                "labels": [-100] * len(row["prompt_ids"]) + row["chosen_ids"],
            }
            for row in rows
        ]
        kind, config = trl.SFTTrainer, trl.SFTConfig(**common)

    class Given(kind):
        reference = 0.0

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset  # tokenised already

        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return SequentialSampler(self.train_dataset)

        def _precompute_ref_logps(self, *arguments: Any, **more: Any) -> Any:
            begun = time.perf_counter()
            done = super()._precompute_ref_logps(*arguments, **more)
            self.reference += time.perf_counter() - begun
            return done

    clock = Clock()
    data = datasets.Dataset.from_list(rows)
    trainer = Given(MODEL, args=config, train_dataset=data, processing_class=TOKENIZER, callbacks=[clock], peft_config=LORA)
    outcome = peft.set_peft_model_state_dict(trainer.model, load_file(FOLDER / "lora.safetensors"))
    assert not outcome.unexpected_keys
    trainer.train()
    trainer.model.unload()  # leaves MODEL as it was
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"seconds": clock.seconds, "losses": losses, "reference": trainer.reference}


def generate(prompts: list[int], new_tokens: int) -> float:
    """Seconds of greedy decoding of these rows' prompts."""
    ids = [ROWS[n]["prompt_ids"] for n in prompts]
    width = max(map(len, ids))
    tokens = torch.tensor([[TOKENIZER.pad_token_id or 0] * (width - len(row)) + row for row in ids], device=MODEL.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=MODEL.device)
    begun = time.perf_counter()
    with torch.inference_mode():
        MODEL.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


if __name__ == "__main__":
    serve({"train": train, "generate": generate}, lambda: torch.cuda.max_memory_allocated() / 1e9 if CUDA else None)
