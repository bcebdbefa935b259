"""The default recipe: one adapter of each kind learns to be concise, then the dial is slid on prompts it has not seen."""

from __future__ import annotations

import dataclasses
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from meetjax.adapters.algebra import at_strength
from meetjax.adapters.bank import KIND_OF, init_bank
from meetjax.adapters.edit import EditSpec
from meetjax.adapters.identity import IdentitySpec
from meetjax.adapters.io import save_adapters
from meetjax.adapters.lora import LoraSpec
from meetjax.adapters.prompt import PromptSpec
from meetjax.adapters.tree import Bank, count_parameters
from meetjax.align import open_reference
from meetjax.data.loader import Buckets
from meetjax.data.tokenize import Rows, tokenize_records
from meetjax.errors import MeetjaxError
from meetjax.evaluate.curves import dial_curve
from meetjax.evaluate.preference import accuracy, base_logps, row_logps, shorter_accuracy
from meetjax.evaluate.report import write_report
from meetjax.evaluate.summary import write_summary
from meetjax.generate.requests import Completion, Request, generate_texts
from meetjax.models.load import Model, load
from meetjax.objectives.preference import Dpo
from meetjax.train.fit import fit
from meetjax.train.metrics import peak_rss_gb, read_metrics
from meetjax.train.reference import Reference
from meetjax.train.sharding import make_mesh
from meetjax.train.stage import Data, Optim, Recipe, Stage, Train, resolved
from meetjax.train.view import read_rows

MODEL = "smollm2-135m-instruct"
STRENGTHS = (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0)
CURVE_PROMPTS = 8
SAMPLE_PROMPTS = 3
MAX_NEW_TOKENS = 96

RECIPE = Recipe(
    name="demo",
    model=MODEL,
    data=Data(path="concise", held_out=24, max_length=144, buckets=(192,)),
    train=Train(steps=8, batch_size=4, save_every=8),
    stages=(
        Stage((PromptSpec(length=8, text="Be brief."),), Dpo(beta=0.1), Optim(learning_rate=1e-2)),
        Stage((LoraSpec(rank=8, alpha=16.0, sites=("q", "v")),), Dpo(beta=0.1), Optim(learning_rate=1.5e-3)),
        Stage((EditSpec(),), Dpo(beta=0.1), Optim(learning_rate=5e-3)),
        Stage((IdentitySpec(),), Dpo(beta=0.1), Optim(learning_rate=7e-5)),
    ),
)
"""Each stage trains one kind from the base; unlike in `align`, a stage does not build on the one before."""


def run(out: Path, recipe: Recipe = RECIPE) -> dict[str, Any]:
    """Trains, sweeps and writes `out/report.html`, `out/summary.json` and `out/adapters/KIND`; returns the summary."""
    begun, console, times = time.monotonic(), Console(), {}

    @contextmanager
    def timed(phase: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        times[phase] = round(times.get(phase, 0.0) + time.monotonic() - start, 1)

    with timed("load model"):
        model = load(recipe.model)
    with timed("read data"):
        rows, held_rows, _, records, lengths = read_rows(recipe.data, recipe.stages[0], model.tokenizer, console)
        prompts = [record.prompt for record in records[:CURVE_PROMPTS]]
        curve_rows, _ = tokenize_records(records[:CURVE_PROMPTS], model.tokenizer, recipe.data.max_length)
    if held_rows is None:
        raise MeetjaxError("demo: data.held_out", expected="> 0", found=0)
    reference = open_reference(model)
    with timed("base model on held-out pairs"):
        base = base_logps(reference, held_rows, lengths)
    with timed("base model generates"):
        plain = generate_texts(model, [Request(prompt) for prompt in prompts], max_new_tokens=MAX_NEW_TOKENS)
    summary: dict[str, Any] = {
        "model": model.name,
        "command": "meetjax demo",
        "untrained": _named(accuracy(np.zeros(len(held_rows)))),
        "baseline_shorter_accuracy": shorter_accuracy(held_rows),
        "baseline_untrained_logps_accuracy": accuracy(base[:, 0] - base[:, 1])["accuracy"],
        "recipe": resolved(recipe),
        "kinds": {},
    }
    samples: list[dict[str, Any]] = []
    for stage in recipe.stages:
        (spec,) = stage.trains
        kind = KIND_OF[type(spec)]
        with timed("train"):
            start = time.monotonic()
            shutil.rmtree(out / kind, ignore_errors=True)  # always trained anew: the report's times are those of this run
            bank = _train(recipe, stage, model, rows, lengths, reference, out / kind, console)
            train_s = time.monotonic() - start
        save_adapters(out / "adapters" / kind, bank, base=model.name, fingerprint=model.fingerprint, recipe=resolved(recipe))
        with timed("held-out pairs"):
            ratio = row_logps(model.config, model.params, bank, held_rows, lengths) - base
        with timed("sweep: generate"):
            answers = _sweep(model, bank, prompts)
        with timed("sweep: margin and KL"):
            curve = dial_curve(model.config, model.params, bank, curve_rows, lengths, STRENGTHS)
            for point in curve:
                point["mean_tokens"] = float(np.mean([answer.tokens for answer in answers[point["strength"]]]))
        history = [row["loss"] for row in read_metrics(out / kind)]
        summary["kinds"][kind] = _named(accuracy(ratio[:, 0] - ratio[:, 1])) | {
            "trained_parameters": count_parameters(bank),
            "train_s": round(train_s, 1),
            "steps": recipe.train.steps,
            "final_loss": history[-1],
            "losses": history,
            "curve": curve,
            "strength_0_equals_base": [answer.ids for answer in answers[0.0]] == [answer.ids for answer in plain],
        }
        tokens = ", ".join(f"{point['strength']:g}: {point['mean_tokens']:.0f}" for point in curve)
        console.print(f"{kind}: held-out accuracy {summary['kinds'][kind]['held_out_accuracy']:.3f}, tokens at strength {tokens}")
        for i in range(SAMPLE_PROMPTS):
            samples.append({"prompt": prompts[i], "kind": kind, "answers": {s: answers[s][i].text for s in STRENGTHS}})
    summary |= {
        "trained_parameters": {kind: entry["trained_parameters"] for kind, entry in summary["kinds"].items()},
        "times": times,
        "versions": {name: version(name) for name in ("meetjax", "jax", "flax", "optax")} | {"python": platform.python_version()},
        "wall_s": round(time.monotonic() - begun, 1),
        "peak_rss_gb": round(peak_rss_gb(), 3),
    }
    write_summary(summary, out)
    console.print(f"wrote {write_report(summary, samples, out)} in {summary['wall_s']:.0f} s, peak memory {summary['peak_rss_gb']:.1f} GB")
    return summary


def _train(
    recipe: Recipe, stage: Stage, model: Model, rows: Rows, buckets: Buckets, reference: Reference, folder: Path, console: Console
) -> Bank:
    specs = tuple(spec for spec in stage.trains if spec != "base")
    bank = init_bank(model.config, model.params, specs, model.tokenizer, jax.random.key(recipe.train.seed))
    identity = {"recipe": resolved(dataclasses.replace(recipe, stages=(stage,))), "fingerprint": model.fingerprint}
    _, bank = fit(
        model.config, model.params, bank, rows, stage, recipe.train, folder,
        buckets=buckets, mesh=make_mesh(recipe.train.mesh), identity=identity,
        reference=reference, title=folder.name, console=console,
    )  # fmt: skip
    return bank


def _sweep(model: Model, bank: Bank, prompts: list[str]) -> dict[float, list[Completion]]:
    """Greedy answers to every prompt at every strength, all in one batch."""
    requests = []
    for strength in STRENGTHS:
        gates, dial = at_strength(bank, strength)
        requests += [Request(prompt, gates=gates, dial=dial) for prompt in prompts]
    answers = generate_texts(model, requests, adapters=bank, max_new_tokens=MAX_NEW_TOKENS, batch_size=len(requests))
    return {strength: answers[i * len(prompts) : (i + 1) * len(prompts)] for i, strength in enumerate(STRENGTHS)}


def _named(facts: dict[str, Any]) -> dict[str, Any]:
    return {"held_out_accuracy": facts["accuracy"], "interval": facts["interval"], "n": facts["n"]}
