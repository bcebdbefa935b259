"""The prompts of the demo's set, and the rule by which its rows are kept."""

from __future__ import annotations

import importlib.util
import itertools
import re
from pathlib import Path

import pytest

from meetjax.errors import MeetjaxError

SCRIPT = Path(__file__).parents[2] / "experiments" / "make_concise_set.py"
LONG = "Bees visit many flowers, drink the nectar, carry it home, and dry it in wax cells until it has become thick honey."


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_concise_set", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_prompts_are_distinct_and_of_the_right_length(script):
    prompts = script.read_prompts(script.PROMPTS)
    assert len(prompts) == len(set(prompts)) >= 280
    assert all(5 <= len(prompt.split()) <= 20 for prompt in prompts)
    assert all(prompt.isascii() and prompt == prompt.strip() for prompt in prompts)


def test_no_two_prompts_share_most_of_their_words(script):
    words = [set(re.findall(r"[a-z]+", prompt.lower())) for prompt in script.read_prompts(script.PROMPTS)]
    closest = max(len(a & b) / len(a | b) for a, b in itertools.combinations(words, 2))
    assert closest < 0.75


@pytest.mark.parametrize(
    ("concise", "detailed", "reason"),
    [
        (("Bees dry nectar.", 5), (LONG, 26), None),
        (("Bees dry nectar.", 18), (LONG, 27), None),
        (("Bees dry nectar.", 18), (LONG, 26), "not shorter"),
        (("", 0), (LONG, 26), "no whole sentence"),
        (("Bees dry nectar.", 5), ("", 0), "no whole sentence"),
        (("Steps:\n1. Dry nectar.", 5), (LONG, 26), "several lines"),
        (("Bees dry nectar.", 5), (LONG + " " + LONG, 52), "repeats"),
        (("Bees dry nectar.", 5), ("it is one of the, it is one of the, it is one of the", 26), "repeats"),
    ],
)
def test_rows_are_kept_or_dropped_for_the_stated_reason(script, concise, detailed, reason):
    found = script.why_not(concise, detailed)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("Bees dry nectar. They store it. Then", "Bees dry nectar.", "Bees dry nectar. They store it."),
        ("Use 1. flour and 2. eggs! Done", "Use 1. flour and 2. eggs!", "Use 1. flour and 2. eggs!"),
        ("no end in sight", "", ""),
    ],
)
def test_answers_are_cut_at_the_end_of_a_sentence(script, text, first, last):
    assert (script.cut(text, True), script.cut(text, False)) == (first, last)


@pytest.mark.parametrize(("text", "problem"), [("a b\n\nc d\n", ":2: empty line"), ("a b\nc d\nA b\n", ":3: prompt given twice")])
def test_bad_prompt_files_are_refused_with_their_line(script, tmp_path, text, problem):
    path = tmp_path / "prompts.txt"
    path.write_text(text)
    with pytest.raises(MeetjaxError, match=problem):
        script.read_prompts(path)
