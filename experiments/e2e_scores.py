"""BLEU, NIST and ROUGE-L of greedy answers to the meaning representations that red_e2e.py holds out, as JSON.

    python experiments/e2e_scores.py devset.csv.gz                                        the base
    python experiments/e2e_scores.py devset.csv.gz --adapters runs/red_e2e/adapters       with what was trained

The file that was trained on is split as for training, by the recipe beside the adapters; of another, testset_w_refs.csv, as many rows
are drawn. An answer is compared with every reference of the file. The paper searches with 10 beams, these answers are greedy.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tyro

from meetjax.errors import MeetjaxError


def score(file: Path, adapters: Path | None, model: str, count: int, max_new_tokens: int) -> dict[str, Any]:
    """Scores of the first `count` held-out meaning representations, and {"answers": {meaning representation: text}}."""
    from red_e2e import get_config

    from meetjax.adapters.io import load_adapters, read_manifest
    from meetjax.data.audit import split_rows
    from meetjax.data.records import read_records
    from meetjax.evaluate.nlg import nlg_scores
    from meetjax.generate.requests import Request, generate_texts
    from meetjax.models.load import load
    from meetjax.train.stage import resolved

    data = resolved(get_config())["data"] | (read_manifest(adapters)["recipe"].get("data", {}) if adapters else {})
    records, _ = read_records(file, "completion", limit=data["limit"], columns=tuple(data["columns"]))
    _, held_out, _ = split_rows(records, data["held_out"], data["seed"])
    prompts = list(dict.fromkeys(record.prompt for record in held_out))[:count]
    references = [[record.completion for record in records if record.prompt == prompt] for prompt in prompts]
    loaded = load(model)
    bank = load_adapters(adapters, loaded.fingerprint) if adapters else None
    requests = [Request(prompt) for prompt in prompts]
    done = generate_texts(loaded, requests, adapters=bank, max_new_tokens=max_new_tokens, template=data["template"])
    answers = [completion.text.strip() for completion in done]
    return nlg_scores(answers, references) | {"answers": dict(zip(prompts, answers, strict=True))}


def main(
    file: tyro.conf.Positional[Path],
    adapters: Path | None = None,
    model: str = "smollm2-135m-instruct",
    count: int = 100,
    max_new_tokens: int = 100,
) -> None:
    """Print the scores.

    Args:
        file: a csv of E2E, with the columns of the recipe.
        adapters: folder of trained adapters (none: the base).
        model: hub id, folder, .gguf file or smollm2-135m-instruct.
        count: how many meaning representations at most.
        max_new_tokens: limit of an answer in tokens.
    """
    print(json.dumps(score(file, adapters, model, count, max_new_tokens), indent=1, ensure_ascii=False))


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except MeetjaxError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
