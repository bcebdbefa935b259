"""Makes `meetjax/data/concise.jsonl`: one concise and one detailed answer to each prompt of `concise_prompts.txt`.

    .venv/bin/python experiments/make_concise_set.py

SmolLM2-135M-Instruct (Apache-2.0) answers every prompt twice, greedily, under two system prompts; CPU is enough (3 minutes on 2
cores). So small a model does not stop when told to, so each answer is cut at the end of a sentence: the concise one after its
first, the detailed one after the last that fits `LONGEST` tokens. A stored row is {"prompt", "chosen": concise, "rejected":
detailed}; the system prompts are left out, so what is learnt from the set is to be concise without being asked. Rows where the
model did not do as told are dropped and counted; fewer than 240 is an error.
"""

from __future__ import annotations

import collections
import json
import os
import re
import sys
from pathlib import Path

import meetjax
from meetjax.errors import MeetjaxError

PROMPTS = Path(__file__).parent / "concise_prompts.txt"
OUT = Path(meetjax.__file__).parent / "data" / "concise.jsonl"
MODEL = "smollm2-135m-instruct"
CONCISE = "You are a helpful assistant. Answer with one short sentence and nothing else."
DETAILED = "You are a helpful assistant. Answer in detail, in one paragraph of three or four sentences."
LONGEST = 96  # tokens of a detailed answer: what the demo trains on and generates
CONCISE_LIMIT = 48  # tokens within which the first sentence must end
SHORTER = 1.5  # a concise answer has at most 1 / SHORTER of the tokens of the detailed one
SENTENCE_END = re.compile(r"(?<=[a-z)\]\"'”’%][.!?])(?=\s|$)")  # not after a digit or capital: list numbers, initials
LEAST = 240  # rows

Answer = tuple[str, int]
"""Text, cut at the end of a sentence (empty when none ends), and its tokens without the end of text."""


def answers(model, prompts: list[str], system: str, max_new_tokens: int, first_sentence: bool) -> list[Answer]:
    """The greedy answer to each prompt under one system prompt, cut after its first or its last whole sentence."""
    from meetjax.generate.requests import Request, generate_texts  # here, so that the rules can be used without the model

    results = generate_texts(model, [Request(prompt, system=system) for prompt in prompts], max_new_tokens=max_new_tokens)
    texts = [cut(result.text, first_sentence) for result in results]
    return [(text, len(model.tokenizer(text, add_special_tokens=False)["input_ids"])) for text in texts]


def cut(text: str, first_sentence: bool) -> str:
    """`text` up to the end of its first or last whole sentence; empty when no sentence ends."""
    text = text.strip()
    ends = [match.start() for match in SENTENCE_END.finditer(text)]
    return text[: ends[0] if first_sentence else ends[-1]].strip() if ends else ""


def repeats(text: str) -> bool:
    """Whether a sentence occurs twice or four words in a row occur three times: what a small model does when it is stuck."""
    sentences = [sentence for part in re.split(r"[.!?\n]+", text.lower()) if len(sentence := " ".join(part.split())) > 12]
    words = re.findall(r"\w+", text.lower())
    runs = collections.Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
    return len(set(sentences)) < len(sentences) or max(runs.values(), default=0) >= 3


def why_not(concise: Answer, detailed: Answer) -> str | None:
    """Why a pair of answers is not a row of the set; None when it is."""
    if not concise[0] or not detailed[0]:
        return "an answer has no whole sentence"
    if "\n" in concise[0]:
        return "the concise answer has several lines"
    if concise[1] * SHORTER > detailed[1]:
        return f"the concise answer is not shorter by a factor of {SHORTER:g}"
    if repeats(concise[0]) or repeats(detailed[0]):
        return "an answer repeats itself"
    return None


def read_prompts(path: Path) -> list[str]:
    """The prompts, one a line. Raises MeetjaxError for an empty line or one that occurs twice."""
    lines = path.read_text(encoding="utf-8").splitlines()
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise MeetjaxError(f"{path}:{number}: empty line", expected="one prompt a line", fix="delete it")
        if line.lower() in seen:
            raise MeetjaxError(f"{path}:{number}: prompt given twice", found=f"the same in line {seen[line.lower()]}", fix="delete one")
        seen[line.lower()] = number
    return lines


def main() -> int:
    """Writes the set and prints what was dropped and why; returns the exit status."""
    prompts = read_prompts(PROMPTS)
    model = meetjax.load(MODEL)
    concise = answers(model, prompts, CONCISE, CONCISE_LIMIT, first_sentence=True)
    detailed = answers(model, prompts, DETAILED, LONGEST, first_sentence=False)
    rows, dropped = [], collections.Counter()
    for prompt, short, long in zip(prompts, concise, detailed, strict=True):
        reason = why_not(short, long)
        if reason is None:
            rows.append((prompt, short, long))
        else:
            dropped[reason] += 1
    print(f"{len(rows)} of {len(prompts)} prompts kept")
    for reason, count in dropped.most_common():
        print(f"{count:5d}  {reason}")
    if len(rows) < LEAST:
        fix = "add prompts to concise_prompts.txt or reword the system prompts"
        raise MeetjaxError(f"{OUT}: rows left", expected=f"at least {LEAST}", found=len(rows), fix=fix)
    for name, column in (("concise", 1), ("detailed", 2)):
        print(f"{name}: mean {sum(row[column][1] for row in rows) / len(rows):.1f} tokens")
    text = "".join(
        json.dumps({"prompt": prompt, "chosen": short[0], "rejected": long[0]}, ensure_ascii=False) + "\n" for prompt, short, long in rows
    )
    fresh = OUT.with_suffix(".tmp")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, OUT)
    print(f"wrote {OUT}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MeetjaxError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
