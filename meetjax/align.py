"""The main job: a recipe becomes adapters, a summary and the numbers that say whether they work."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from meetjax.adapters.bank import KIND_OF, init_bank
from meetjax.adapters.io import save_adapters
from meetjax.adapters.tree import KINDS, Bank, count_parameters
from meetjax.data.loader import Buckets
from meetjax.data.tokenize import Rows
from meetjax.errors import MeetjaxError
from meetjax.evaluate.preference import accuracy, base_logps, row_logps, shorter_accuracy
from meetjax.evaluate.report import write_summary
from meetjax.models.config import ModelConfig
from meetjax.models.load import Model, load
from meetjax.models.sources import cache_dir
from meetjax.train.fit import fit
from meetjax.train.metrics import peak_rss_gb
from meetjax.train.reference import Reference
from meetjax.train.sharding import base_shardings, make_mesh
from meetjax.train.stage import Recipe, Stage, check_recipe, resolved
from meetjax.train.view import check_columns, read_rows


def align(recipe: Recipe, *, console: Console | None = None) -> dict[str, Any]:
    """Runs every stage of a recipe, evaluates on held-out prompts and writes `out/summary.json` and `out/adapters/`.

    A run that was interrupted goes on where its last checkpoint stands. Returns the summary. Raises MeetjaxError for a
    recipe, data, model or folder that cannot be used, and when training diverges; Interrupted after SIGTERM.
    """
    begun, console = time.monotonic(), console or Console()
    check_recipe(recipe)
    for i, stage in enumerate(recipe.stages):
        if "base" in stage.trains:
            fix = "align writes adapters only; train a whole model with meetjax.train.fit.fit"
            raise MeetjaxError(f"recipe: stages.{i}.trains", expected="adapter kinds", found="base", fix=fix)
    out = Path(recipe.out or f"runs/{recipe.name}")
    mesh = make_mesh(recipe.train.mesh)
    console.print(f"{recipe.name}: {recipe.model} -> {out}")
    model = load(recipe.model, dtype=recipe.dtype, shardings=lambda config: base_shardings(config, mesh))
    config = dataclasses.replace(model.config, dtype=recipe.dtype, remat=recipe.remat)
    if recipe.data.max_length > config.max_position:
        expected = f"at most {config.max_position}, the positions of {model.name}"
        raise MeetjaxError("recipe: data.max_length", expected=expected, found=recipe.data.max_length)
    reference = open_reference(model, config)
    bank, held_rows, contrast, buckets = Bank(), None, None, ()
    for i, stage in enumerate(recipe.stages):
        rows, held_rows, contrast, _, buckets = read_rows(recipe.data, stage, model.tokenizer, console)
        bank = _with_new_kinds(bank, stage, config, model, recipe.train.seed)
        check_columns(bank, rows, f"stages.{i}")
        _, bank = fit(
            config, model.params, bank, rows, stage, recipe.train, out / f"stage-{i}",
            buckets=buckets, mesh=mesh, identity=_identity(recipe, model, i),
            reference=reference, title=f"stage {i}: {type(stage.objective).__name__.lower()}", console=console,
        )  # fmt: skip
    save_adapters(out / "adapters", bank, base=model.name, fingerprint=model.fingerprint, recipe=resolved(recipe))
    summary: dict[str, Any] = {
        "name": recipe.name,
        "model": model.name,
        "trained_parameters": count_parameters(bank),
        "recipe": resolved(recipe),
    }
    if held_rows is not None:
        console.print(f"evaluating on {len(held_rows):,} held-out rows")
        summary |= held_out(config, model, bank, reference, held_rows, contrast, buckets)
    summary |= {"wall_s": round(time.monotonic() - begun, 1), "peak_rss_gb": round(peak_rss_gb(), 3)}
    console.print(f"wrote {write_summary(summary, out)}")
    return summary


def _with_new_kinds(bank: Bank, stage: Stage, config: ModelConfig, model: Model, seed: int) -> Bank:
    """The bank with the kinds that this stage is the first to train; what an earlier stage trained is continued."""
    new = tuple(spec for spec in stage.trains if spec != "base" and getattr(bank, KIND_OF[type(spec)]) is None)
    wide = max(stage.view.controls, 1)
    made = init_bank(config, model.params, new, model.tokenizer, jax.random.key(seed), wide) if new else Bank()
    return Bank(**{kind: getattr(bank, kind) or getattr(made, kind) for kind in KINDS})


def open_reference(model: Model, config: ModelConfig) -> Reference:
    """The scores of this base that earlier runs have left in the cache folder, and those to come."""
    return Reference(config, model.params, cache_dir() / "reference.sqlite", model.fingerprint)


def held_out(
    config: ModelConfig, model: Model, bank: Bank, reference: Reference, rows: Rows, contrast: Rows | None, buckets: Buckets
) -> dict[str, Any]:
    """Implicit-reward accuracy s - s_ref over held-out pairs with its interval, beside what costs no training.

    A model that was told classes apart is its own reference: s under the good class less s under the bad one (`contrast`).
    Demonstrations have no rejected answer: for them the loss in nats a token, beside the base model's.
    """
    base = base_logps(reference, rows, buckets)
    policy = row_logps(config, model.params, bank, rows, buckets)
    against = base if contrast is None else row_logps(config, model.params, bank, contrast, buckets)
    if policy.shape[1] == 1:
        tokens = float((rows.lengths - rows.starts).sum())
        return {"held_out_loss": -policy.sum() / tokens, "baseline_untrained_loss": -base.sum() / tokens, "held_out_n": len(rows)}
    margins = (policy - against)[:, 0] - (policy - against)[:, 1]
    ours = accuracy(margins)
    return {
        "held_out_accuracy": ours["accuracy"],
        "held_out_interval": ours["interval"],
        "held_out_n": ours["n"],
        "held_out_margin_nats": float(np.mean(margins)),
        "baseline_shorter_accuracy": shorter_accuracy(rows),
        "baseline_untrained_logps_accuracy": accuracy(base[:, 0] - base[:, 1])["accuracy"],
    }


def _identity(recipe: Recipe, model: Model, stage: int) -> dict[str, Any]:
    """What a checkpoint must agree with to be continued: everything but where the results go."""
    facts = resolved(dataclasses.replace(recipe, out=""))
    return {"stage": stage, "fingerprint": model.fingerprint, "recipe": facts}
