"""The command line: one function a sub-command, each a thin call of the library."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from functools import partial
from json import dumps
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from meetjax.errors import MeetjaxError


def align(
    file: Annotated[Path, tyro.conf.Positional],
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FIELD=VALUE")] = (),
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> None:
    """Train the recipe of a file with get_config(), on one host or, started alike on each of them, on several.

    Args:
        file: an experiment, such as experiments/edit_dpo_hh.py.
        set: change a field of the recipe, such as train.steps=50 or out=runs/mine; may be repeated.
        coordinator: HOST:PORT of process 0 of several; not needed on Cloud TPU, GKE and Slurm, which are recognised.
        processes: how many processes take part.
        process: which of them this is, from 0.
    """
    from meetjax.launch import join_hosts

    join_hosts(coordinator, processes, process)
    from meetjax.align import align as run
    from meetjax.experiment import read_recipe
    from meetjax.train.stage import override

    run(override(read_recipe(file), list(set)))


def grid(
    file: Annotated[Path, tyro.conf.Positional],
    out: Path | None = None,
    only: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="AXIS=CHOICE,...")] = (),
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FIELD=VALUE")] = (),
) -> None:
    """Run every combination of a file's AXES that is not yet run.

    Args:
        file: a grid, such as experiments/tradeoffs.py, with AXES and get_config(one argument an axis).
        out: folder of the runs, the table and the figure (runs/NAME of the file).
        only: choices of an axis to keep, such as data=concise; may be repeated.
        set: change a field of every recipe, such as train.steps=50; may be repeated.
    """
    from meetjax.experiment import read_module, told_where
    from meetjax.grid import make_cells, run_grid

    module: Any = read_module(file)
    if not isinstance(getattr(module, "AXES", None), dict) or not callable(getattr(module, "get_config", None)):
        raise MeetjaxError(f"{file}", expected="AXES, a mapping, and get_config(one argument an axis)", found="not both")
    out = out or Path("runs") / file.stem
    run_grid(told_where(file, partial(make_cells, module.AXES, module.get_config, out, set, only)), out)


def generate(
    prompt: str,
    adapter: Path | None = None,
    strength: tuple[float, ...] = (),
    dial: float | None = None,
    model: str = "smollm2-135m-instruct",
    quantize: Literal["none", "int8", "int4"] = "none",
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> None:
    """Answer a prompt with an adapter at a strength.

    Args:
        prompt: the user's message.
        adapter: folder of a trained adapter (none: the base model).
        strength: how much of the adapter: 0 base, 1 trained, between, beyond, or below 0 for the other way; one for each gate column.
        dial: mix logits instead of weights, z = dial * adapted + (1 - dial) * base, with the adapter in full.
        model: hub id, folder, .gguf file or smollm2-135m-instruct.
        quantize: hold the linear weights as integers.
        system: a system message.
        max_new_tokens: limit of the answer in tokens.
        temperature: 0 is greedy.
        top_k: sample among the k most likely tokens (0: all).
        top_p: sample among the smallest set of tokens with this mass.
        seed: of the sampling.
    """
    from meetjax.adapters.algebra import at_strength
    from meetjax.adapters.io import load_adapters
    from meetjax.adapters.tree import columns
    from meetjax.generate.requests import Request, generate_texts
    from meetjax.generate.sampling import Sampling
    from meetjax.models.load import load

    if adapter is None and (strength or dial is not None):
        raise MeetjaxError("generate: --strength or --dial without an adapter", fix="name one with --adapter DIR")
    if strength and dial is not None:
        raise MeetjaxError("generate: --strength and --dial", expected="one of them", found="both")
    sampling = Sampling(temperature, top_k, top_p)
    loaded = load(model, quantize=quantize)
    bank, gates = None, None
    if adapter is not None:
        bank = load_adapters(adapter, loaded.fingerprint)
        if dial is None:
            gates, dial = at_strength(bank, *(strength or (1.0,)))
        elif columns(bank) > 1:
            fix = "choose among them with --strength"
            raise MeetjaxError("generate: --dial", expected="an adapter of one gate column", found=f"{columns(bank)} columns", fix=fix)
    request = Request(prompt, system=system, gates=gates, dial=dial, sampling=sampling, seed=seed)
    print(generate_texts(loaded, [request], adapters=bank, max_new_tokens=max_new_tokens)[0].text)


def plan(
    model: str,
    topology: str,
    recipe: str = "lora-dpo",
    batch: int = 256,
    length: int = 2048,
    what: Literal["train", "decode"] = "train",
    slices: int = 1,
    mesh: tuple[int, int, int] | None = None,
    remat: Literal["full", "dots", "none"] | None = None,
    attention: Literal["auto", "xla", "splash"] = "auto",
    base: str = "bfloat16",
    microbatches: int = 0,
    shared_prompt: bool = False,
    dial: bool = True,
    suggest: bool = True,
    json: bool = False,
) -> None:
    """Compile a step for a TPU topology without a TPU: does it fit, what does it cost, what would be better.

    Args:
        model: a published model such as llama-2-7b, or a config.json; no weights are read.
        topology: such as v5e:16x16 or v5p:4x4x4.
        recipe: such as lora-dpo, red-dpo, clm-dpo, prompt-dpo or lora-sft, or a file with get_config(), whose first stage counts.
        batch: prompts a step; rows that decode.
        length: tokens of a row.
        what: the training step, or one decoding step.
        slices: of the topology, joined by the data axis.
        mesh: data, fsdp and model (chosen by rule).
        remat: what the forward pass keeps (full).
        attention: who computes attention; auto says why.
        base: how the frozen weights are held: float32, bfloat16, int8 or int4.
        microbatches: parts of the batch, one after another (0: chosen by rule).
        shared_prompt: the answers to a prompt lie behind one copy of it, in one row.
        dial: rows decode with the logit dial, adapted and base beside each other.
        suggest: compile neighbouring settings, too, and name the best.
        json: print plain data.
    """
    import jax
    from rich.console import Console

    from meetjax.experiment import read_recipe
    from meetjax.models.published import find_config
    from meetjax.plan.compiler import ask
    from meetjax.plan.question import RECIPES, Question
    from meetjax.plan.settings import first_setting
    from meetjax.plan.settings import suggest as find_better
    from meetjax.plan.table import as_json, as_table, say_setting

    jax.config.update("jax_platforms", "cpu")  # only the compiler of another platform is needed
    if recipe.endswith(".py"):
        stage = read_recipe(Path(recipe)).stages[0]
    elif recipe in RECIPES:
        stage = RECIPES[recipe]
    else:
        raise MeetjaxError("plan: recipe", expected="a .py file or one of " + ", ".join(RECIPES), found=recipe)
    question = Question(model, find_config(model), recipe, stage, topology, batch, length, what, slices, shared_prompt, dial)
    chosen = {"mesh": mesh, "remat": remat, "attention": attention, "base": base, "microbatches": microbatches}
    setting = first_setting(question, **chosen)
    told = Console(stderr=True)
    with told.status(f"compiling: {say_setting(setting)}") as status:
        answer = ask(question, setting)
        better = find_better(question, answer, lambda name: status.update(f"trying {name}")) if suggest else None
    if json:
        print(dumps(as_json(question, answer, better), indent=2))
    else:
        Console().print(as_table(question, answer, better))
    if not answer.fits:
        sys.exit(1)


def chat(
    adapter: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=DIR")] = (),
    model: str = "smollm2-135m-instruct",
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> None:
    """Talk to a model, with a dial for every adapter: /set NAME STRENGTH.

    Args:
        adapter: name and folder of a trained adapter; may be repeated.
        model: hub id, folder, .gguf file or smollm2-135m-instruct.
        max_new_tokens: limit of an answer in tokens.
        temperature: 0 is greedy.
        top_k: sample among the k most likely tokens (0: all).
        top_p: sample among the smallest set of tokens with this mass.
        seed: of the sampling.
    """
    from rich.console import Console

    from meetjax.chat import Chat, named_folders, talk
    from meetjax.generate.sampling import Sampling
    from meetjax.models.load import load

    folders, sampling = named_folders(adapter), Sampling(temperature, top_k, top_p)
    talk(Chat(load(model), folders, sampling=sampling, seed=seed, max_new_tokens=max_new_tokens), Console())


def sweep(
    adapter: Path,
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction],
    strengths: str = "-1:2:0.25",
    out: Path = Path("runs/sweep"),
    model: str = "smollm2-135m-instruct",
    max_new_tokens: int = 128,
) -> None:
    """Answer prompts at every strength of an adapter, in one batch; draw length and distance from the base against strength.

    Args:
        adapter: folder of a trained adapter.
        prompt: a user's message; may be repeated.
        strengths: first:last:step, both ends included, or some of them: 0,0.5,1.
        out: folder for sweep.csv and sweep.svg.
        model: hub id, folder, .gguf file or smollm2-135m-instruct.
        max_new_tokens: limit of an answer in tokens.
    """
    from rich.console import Console

    from meetjax.adapters.io import load_adapters
    from meetjax.models.load import load
    from meetjax.sweep import parse_strengths, show, sweep_prompts, write

    wanted = parse_strengths(strengths)
    loaded = load(model)
    points = sweep_prompts(loaded, load_adapters(adapter, loaded.fingerprint), prompt, wanted, max_new_tokens)
    show(points, Console())
    print(f"wrote {write(points, out)}")


def export(
    adapter: Annotated[Path, tyro.conf.Positional],
    to: Literal["peft", "merged", "gguf-vector", "prompt-embeds"],
    out: Path,
    model: str = "smollm2-135m-instruct",
    strength: tuple[float, ...] = (),
) -> None:
    """Write an adapter in a form that other programs read, and compare the logits that they compute from it.

    Args:
        adapter: folder of a trained adapter.
        to: a peft adapter (LoRA, soft prompt), a merged Hugging Face model (LoRA, edits), a control vector for llama.cpp (biases
            at down), or embeddings for servers that take them (soft prompt).
        out: a new folder.
        model: the base: hub id, folder, .gguf file or smollm2-135m-instruct.
        strength: of the adapter, fixed in what is written; or one for each of its gate columns.
    """
    from meetjax.export import export_adapter

    proof = export_adapter(adapter, to, out, model, strength)
    print(f"wrote {out}\n{proof}")


def import_(
    folder: Annotated[Path, tyro.conf.Positional],
    out: Path,
    model: str = "smollm2-135m-instruct",
) -> None:
    """Read a LoRA or a soft prompt that peft has saved.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        out: a new folder for the adapter.
        model: the base it was trained on: hub id, folder, .gguf file or smollm2-135m-instruct.
    """
    from meetjax.export import import_adapter

    proof = import_adapter(folder, out, model)
    print(f"wrote {out}\n{proof}")


def demo(out: Path = Path("runs/demo")) -> None:
    """Train one adapter of each kind to be concise, slide the dial, write report.html and summary.json.

    Args:
        out: folder of the report.
    """
    from meetjax.demo import run

    run(out)


def selftest(model: str = "smollm2-135m-instruct") -> None:
    """Check the laws that everything rests on, on a real model, in about a minute.

    Args:
        model: hub id, folder, .gguf file or smollm2-135m-instruct.
    """
    import jax

    from meetjax.selftest import run

    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", 4)  # so that a mesh has something to permute where there is only a CPU
    if not run(model):
        sys.exit(1)


def serve(
    model: str = "smollm2-135m-instruct",
    adapter: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=DIR")] = (),
    host: str | None = None,
    port: int = 8000,
    api_key: str | None = None,
    slots: int = 8,
    capacity: int = 1024,
    queue: int = 64,
    page: bool = True,
) -> None:
    """Serve a model and its adapters over HTTP, to OpenAI's clients and on a page.

    Args:
        model: hub id, folder, .gguf file or smollm2-135m-instruct.
        adapter: a name and the folder of a trained adapter; may be repeated.
        host: address to listen on (none: this machine alone); needs a key.
        port: 0 for a free one.
        api_key: that clients must give ($MEETJAX_API_KEY).
        slots: requests answered at once.
        capacity: tokens of prompt and answer, at most.
        queue: requests that may wait; more are told to come again.
        page: whether / is a page to chat on.
    """
    try:
        from meetjax.serve import server
    except ModuleNotFoundError as error:
        raise MeetjaxError("serve", expected="the serve extra", found=f"no {error.name}", fix="pip install 'meetjax[serve]'") from None

    key = api_key or os.environ.get("MEETJAX_API_KEY")
    adapters = server.read_adapters(adapter)
    server.serve(model, adapters, host=host, port=port, key=key, slots=slots, capacity=capacity, queue=queue, page=page)


FUNCTIONS = (align, grid, generate, chat, sweep, serve, export, import_, plan, demo, selftest)
COMMANDS = {function.__name__.rstrip("_"): function for function in FUNCTIONS}


def main() -> None:
    """Runs a sub-command. Exit status 2 for bad input (one line on stderr, a traceback only with --debug), 143 after SIGTERM,
    75 when another host of the run is gone.
    """
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import jax

    from meetjax.launch import fail, leave
    from meetjax.models.sources import cache_dir
    from meetjax.train.fit import Interrupted

    if not debug:  # Orbax logs the traceback of a failed write from each of its threads; the error below says it in one line
        logging.getLogger("absl").setLevel(logging.CRITICAL)
    # Compiled programs are kept between runs: a step of a small model compiles in 10 s and loads in 1 s, some 30 small ones in 2 and 0.1.
    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(cache_dir() / "compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="meetjax", description=__doc__, args=arguments)
    except MeetjaxError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        leave(2)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        leave(143)
    except KeyboardInterrupt:
        print("interrupted; the last checkpoint stands, run the same command to go on", file=sys.stderr)
        leave(130)
    except Exception as error:
        fail(error)


if __name__ == "__main__":
    main()
