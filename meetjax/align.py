"""The main job: a recipe becomes adapters or a trained model, a summary and the numbers that say whether they work."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from rich.console import Console

from meetjax.adapters.algebra import merge_model
from meetjax.adapters.bank import KIND_OF, init_bank
from meetjax.adapters.io import save_adapters
from meetjax.adapters.tree import KINDS, Bank, check_gates, count_parameters, kinds
from meetjax.data.convert import GOOD
from meetjax.data.tokenize import Rows
from meetjax.errors import MeetjaxError
from meetjax.evaluate.drift import drift
from meetjax.evaluate.preference import accuracy, base_logps, row_logps, row_rewards, shorter_accuracy
from meetjax.evaluate.summary import write_summary
from meetjax.generate.requests import encode_prompt
from meetjax.models.fingerprint import file_digest, fingerprint
from meetjax.models.load import Model, load
from meetjax.models.save import check_writable, save_model
from meetjax.models.sources import cache_dir, find_source
from meetjax.objectives.representation import Rahf
from meetjax.train import hosts
from meetjax.train.checkpoint import claimed
from meetjax.train.fit import fit
from meetjax.train.memory import peak_device_gb
from meetjax.train.metrics import peak_rss_gb
from meetjax.train.reference import Reference
from meetjax.train.sharding import base_shardings, check_batch, make_mesh
from meetjax.train.stage import Recipe, Stage, Train, check_recipe, resolved
from meetjax.train.view import Split, check_columns, read_rows


def align(recipe: Recipe, *, console: Console | None = None) -> dict[str, Any]:
    """Runs every stage of a recipe, evaluates on held-out prompts and writes `out/summary.json`, `out/adapters/`, `out/model/`.

    `out/adapters/` is written where a stage trains adapters, `out/model/` where one trains "base": a Hugging Face folder of the base
    as the last such stage left it, and the base that the adapters then belong to. What a stage trains goes on to the next stages.

    The reference of a stage is the base as it stood when that stage began, without adapters: the loaded model, or what earlier
    stages made of its weights. The held-out numbers compare with the loaded model throughout. A base trains in `recipe.dtype`, as do
    its moments in AdamW (in bfloat16 an update below 2^-9 of a weight is lost), and a tied head stays tied: its one leaf gets the
    gradients of both uses. Two copies of the base are held meanwhile, that reference and the one that trains.

    A run that was interrupted goes on where its last checkpoint stands. Returns the summary, whose `wall_s` and `cpu_s` are of
    this call alone. Raises MeetjaxError for a
    recipe, data, model or folder that cannot be used, and when training diverges; Interrupted after SIGTERM.

    Several hosts (`meetjax.launch`) call it alike and see the same files; each reads its rows and its part of the weights, the first
    one prints and writes. What one of them raises before and after training, all raise.
    """
    begun, console = (time.monotonic(), time.process_time()), console or Console()
    if not hosts.writes():
        console = Console(quiet=True)
    with hosts.together("recipe"):
        check_recipe(recipe)
    hosts.agree("recipe", resolved(recipe) | {"meetjax": version("meetjax"), "jax": jax.__version__})
    out = Path(recipe.out or f"runs/{recipe.name}")
    mesh = make_mesh(recipe.train.mesh)
    check_batch(recipe.train.batch_size, mesh, recipe.train.microbatches)
    _check_hosts(recipe, mesh, out)
    with claimed(out):
        return _run(recipe, out, mesh, console, begun)


def _run(recipe: Recipe, out: Path, mesh: jax.sharding.Mesh, console: Console, begun: tuple[float, float]) -> dict[str, Any]:
    changes_base = any("base" in stage.trains or stage.absorb for stage in recipe.stages)
    console.print(f"{recipe.name}: {recipe.model} -> {out}")
    with hosts.together("base"):
        loaded = load(recipe.model, dtype=recipe.dtype, shardings=lambda config: base_shardings(config, mesh), quantize=recipe.quantize)
    loaded = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, dtype=recipe.dtype, residual=recipe.residual))
    if recipe.data.max_length > loaded.config.max_position:
        expected = f"at most {loaded.config.max_position}, the positions of {loaded.name}"
        raise MeetjaxError("recipe: data.max_length", expected=expected, found=recipe.data.max_length)
    if changes_base:
        check_writable(loaded.config, out / "model")  # hours before it is needed
    spread = mesh if mesh.size > 1 else None
    splits: dict[Any, Split] = {}
    with hosts.together("data"):
        for stage in recipe.stages:
            if _seen(stage) not in splits:
                splits[_seen(stage)] = read_rows(recipe.data, stage, loaded.tokenizer, console)
    hosts.agree("data", [_digest(table) for split in splits.values() for table in split[:3] if table is not None])
    _rehearse(recipe, loaded, splits)
    judged = splits[_seen(recipe.stages[-1])]
    model, reference, untrained, bank, teacher = loaded, open_reference(loaded), None, Bank(), None
    if not recipe.evaluation.prompts:
        loaded = dataclasses.replace(loaded, params={})  # nothing asks for its weights once they have changed
    for i, stage in enumerate(recipe.stages):
        split = splits[_seen(stage)]
        if stage.absorb:
            teacher = bank
        if untrained is None and judged.held_out is not None and (stage.absorb or "base" in stage.trains):
            untrained = base_logps(reference, judged.held_out, judged.buckets, mesh=spread)  # while the loaded weights are here
        if stage.absorb:
            model, bank = merge_model(model, bank, stage.absorb), Bank()
            reference = Reference(model.config, model.params)
        bank = _joined(bank, _new_kinds(bank, stage, model, recipe.train.seed))
        params, bank = fit(
            model.config, model.params, bank, split.train, stage, recipe.train, out / f"stage-{i}",
            buckets=split.buckets, mesh=mesh, identity=_identity(recipe, model, i), teacher=teacher, remat=recipe.remat,
            attention=recipe.attention,
            reference=reference if stage.reference == "base" else Reference(model.config, model.params, bank),
            title=f"stage {i}: {type(stage.objective).__name__.lower()}", console=console,
        )  # fmt: skip
        if "base" in stage.trains:
            # Without a file: the fingerprint samples the weights, so it need not tell what a few small steps changed.
            model, reference = dataclasses.replace(model, params=params), Reference(model.config, params)
    summary: dict[str, Any] = {
        "name": recipe.name,
        "model": model.name,
        "trained_parameters": _count_trained(recipe, model, bank, teacher),
        "recipe": resolved(recipe),
    }
    if changes_base:
        model = dataclasses.replace(model, name=str(out / "model"), fingerprint=fingerprint(model.config, model.params))
        console.print(f"wrote {save_model(model, out / 'model')}")
    if kinds(bank):
        made = {"base": model.name, "fingerprint": model.fingerprint, "quantize": model.quantize, "recipe": resolved(recipe)}
        with hosts.together("adapters"):
            if hosts.writes():
                save_adapters(out / "adapters", bank, **made)
    if judged.held_out is not None:
        console.print(f"evaluating on {len(judged.held_out):,} held-out rows")
        rewarded = getattr(recipe.stages[-1].objective, "reads_rewards", False)
        score = row_rewards if rewarded else row_logps
        policy = score(model.config, model.params, bank, judged.held_out, judged.buckets, mesh=spread)
        if untrained is None:
            untrained = base_logps(reference, judged.held_out, judged.buckets, mesh=spread)
        contrast = None
        if judged.contrast is not None:
            contrast = row_logps(model.config, model.params, bank, judged.contrast, judged.buckets, mesh=spread)
        summary |= held_out(untrained, policy, judged.held_out, np.zeros_like(policy) if rewarded else contrast)
    if recipe.evaluation.prompts:
        summary |= _moved(recipe, model, loaded, bank, judged, console)
    summary |= {"wall_s": round(time.monotonic() - begun[0], 1), "cpu_s": round(time.process_time() - begun[1], 1)}
    summary |= {"device": jax.devices()[0].device_kind, "peak_rss_gb": round(peak_rss_gb(), 3)}
    if (peak := peak_device_gb()) is not None:
        summary["peak_device_gb"] = round(peak, 3)
    with hosts.together("summary"):
        if hosts.writes():
            console.print(f"wrote {write_summary(summary, out)}")
    return summary


def _digest(rows: Rows) -> str:
    return f"{len(rows)} rows, {hashlib.sha256(''.join(rows.hashes).encode()).hexdigest()[:12]}"


def _check_hosts(recipe: Recipe, mesh: jax.sharding.Mesh, out: Path) -> None:
    """What can only go wrong with several hosts, before anything is loaded. Raises MeetjaxError on all of them."""
    if jax.process_count() == 1:
        return
    hosts.share_of(mesh)
    if recipe.evaluation.prompts or any("base" in stage.trains or stage.absorb for stage in recipe.stages):
        expected = "adapters to train, and evaluation.prompts=0"
        raise MeetjaxError("recipe: on several hosts", expected=expected, found="a base that changes, or prompts to answer")
    hosts.check_shared(out)
    with hosts.together("base"):
        found = file_digest(find_source(recipe.model).path)
    hosts.agree("base", found)


def _count_trained(recipe: Recipe, model: Model, bank: Bank, teacher: Bank | None) -> int:
    """Numbers that some stage has trained: adapters, those merged into the base, and the base."""
    base = count_parameters(model.params) if any("base" in stage.trains for stage in recipe.stages) else 0
    return count_parameters(bank) + count_parameters(teacher) + base


def _moved(recipe: Recipe, model: Model, loaded: Model, bank: Bank, judged: Split, console: Console) -> dict[str, Any]:
    """Drift from the loaded model on the prompts of held-out rows, under the gates and the marker of good answers where there are such."""
    asked, rows = recipe.evaluation, judged.held_out
    assert rows is not None, "prompts to answer are held out"
    good = 0 if rows.classes is None else int(np.argmax(rows.classes == GOOD))
    gates = None if rows.gates is None else tuple(rows.gates[good].tolist())
    marker = recipe.stages[-1].view.markers[-1] if recipe.stages[-1].view.markers else ""
    room = model.config.max_position - asked.max_new_tokens
    prompts = (judged.records[n].prompt for n in rows.records)  # not those that tokenising left out
    fitting = (p for p in prompts if len(encode_prompt(model.tokenizer, p, recipe.data.template, marker)) <= room)
    short = list(islice(fitting, asked.prompts))
    if not short:
        raise MeetjaxError("evaluation.prompts", expected=f"a held-out prompt of at most {room} tokens", found="none")
    console.print(f"answering {len(short)} held-out prompts")
    return drift(model, loaded, bank, short, gates=gates, marker=marker, template=recipe.data.template, max_new_tokens=asked.max_new_tokens)


def _new_kinds(bank: Bank, stage: Stage, model: Model, seed: int) -> Bank:
    """The kinds that this stage is the first to train; what an earlier stage trained is continued."""
    new = tuple(spec for spec in stage.trains if spec != "base" and getattr(bank, KIND_OF[type(spec)]) is None)
    wide = max(stage.view.controls, 1)
    return init_bank(model.config, model.params, new, model.tokenizer, jax.random.key(seed), wide) if new else Bank()


def _joined(bank: Bank, made: Bank) -> Bank:
    return Bank(**{kind: getattr(bank, kind) or getattr(made, kind) for kind in KINDS})


def _rehearse(recipe: Recipe, model: Model, splits: dict[Any, Split]) -> None:
    """Raises MeetjaxError now for what would end a later stage: a layer that the model lacks, gates for other columns than there are."""
    bank, teacher, layers = Bank(), None, model.config.layers
    for i, stage in enumerate(recipe.stages):
        if stage.absorb:
            check_gates(bank, np.asarray([stage.absorb], np.float32), 1)
            teacher, bank = bank, Bank()
        made: Any = jax.eval_shape(
            lambda params, bank=bank, stage=stage: _new_kinds(bank, stage, dataclasses.replace(model, params=params), 0), model.params
        )
        bank = _joined(bank, made)
        check_columns(bank, splits[_seen(stage)].train, f"stages.{i}")
        taps = getattr(stage.objective, "taps", (1,))
        if min(taps, default=0) < 0 or not 1 <= max(taps, default=0) <= layers:
            raise MeetjaxError(f"recipe: stages.{i}.objective.taps", expected=f"0 to {layers}, one of them above 0", found=taps)
        if isinstance(stage.objective, Rahf):
            _check_looks(stage.objective, teacher, f"recipe: stages.{i}.objective.looks")


def _check_looks(objective: Rahf, teacher: Bank | None, where: str) -> None:
    """Raises MeetjaxError unless the teacher can be seen in the three ways that the objective asks for."""
    if len(objective.looks) != 3:
        raise MeetjaxError(where, expected="three: h, h_good and h_bad", found=len(objective.looks))
    for prompt, gates in objective.looks:
        if not 0 <= prompt < len(objective.asks):
            raise MeetjaxError(where, expected=f"prompts 0 to {len(objective.asks) - 1}, those of asks", found=prompt)
        if gates and teacher is None:
            raise MeetjaxError(where, expected="adapters that this stage absorbs, for gates to open", found="none", fix="set absorb")
        if gates:
            check_gates(teacher, np.asarray([gates], np.float32), 1)


def open_reference(model: Model) -> Reference:
    """The scores of this base that earlier runs have left in the cache folder, and those to come."""
    return Reference(model.config, model.params, file=cache_dir() / "reference.sqlite", fingerprint=model.fingerprint)


def _seen(stage: Stage) -> tuple[Any, ...]:
    """What a stage's rows depend on."""
    objective = stage.objective
    return objective.form, getattr(objective, "partners", False), getattr(objective, "asks", ()), stage.view


def held_out(
    base: Float[np.ndarray, "N C"], policy: Float[np.ndarray, "N C"], rows: Rows, contrast: Float[np.ndarray, "N C"] | None = None
) -> dict[str, Any]:
    """Implicit-reward accuracy s - s_ref over held-out pairs with its interval, beside what costs no training.

    base, policy: log-probabilities of the answers in nats under the loaded model and under what was made of it. A model that was
    told classes apart is its own reference: s under the good class (`policy`) less s under the bad one (`contrast`). The rewards of
    a reward model (`policy`) have no reference: `contrast` is zeros.
    Demonstrations have no rejected answer: for them the loss in nats a token, beside the base model's.
    """
    if policy.shape[1] == 1:
        tokens = float((rows.lengths - rows.starts).sum())
        return {"held_out_loss": -policy.sum() / tokens, "baseline_untrained_loss": -base.sum() / tokens, "held_out_n": len(rows)}
    against = base if contrast is None else contrast
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
    """What a checkpoint must agree with to be continued: everything but where the results go, and on which devices they are made."""
    facts = resolved(dataclasses.replace(recipe, out="", train=dataclasses.replace(recipe.train, mesh=Train().mesh)))
    return {"stage": stage, "fingerprint": model.fingerprint, "recipe": facts}
