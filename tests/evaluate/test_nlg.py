"""BLEU, NIST and ROUGE-L against their maxima, a case by hand and nltk's NIST; the script that scores E2E with them."""

from __future__ import annotations

import csv
import importlib
import math
import sys
from types import SimpleNamespace

import pytest
from nltk.translate.nist_score import corpus_nist

import meetjax.generate.requests as requests_module
import meetjax.models.load as load_module
from meetjax.data.audit import split_rows
from meetjax.data.records import read_records
from meetjax.errors import MeetjaxError
from meetjax.evaluate.nlg import nlg_scores, tokens
from tests.test_stages import FOLDER, load_experiment

REFERENCES = [
    ["The Mill is a cheap pub.", "A cheap pub is The Mill, near the river.", "The Mill pub is not expensive."],
    ["Zizzi serves Italian food for £20-25.", "You can eat Italian at Zizzi."],
    ["Near Burger King there is Aromi."],
]
OUTPUTS = ["The Mill is a pub near the river.", "Zizzi serves food for £20-25.", "There is Aromi near Burger King."]
METRICS = ("bleu", "nist", "rouge_l")


def test_a_reference_itself_is_perfect():
    scores = nlg_scores([own[-1] for own in REFERENCES], REFERENCES)
    assert (scores["bleu"], scores["rouge_l"], scores["n"]) == (pytest.approx(100), pytest.approx(100), 3)
    assert scores["bleu_interval"] == pytest.approx([100, 100]) == scores["rouge_l_interval"]
    worse = nlg_scores(OUTPUTS, REFERENCES)
    assert 0 < worse["bleu"] < 100 and 0 < worse["rouge_l"] < 100
    # eight different words, each worth log2(8) bits, and nothing new in what follows a word
    assert nlg_scores(["a b c d e f g h"], [["a b c d e f g h"]])["nist"] == pytest.approx(3)


def test_nothing_shared_is_zero():
    assert [nlg_scores(["", "x"], [["a cat"], ["a dog"]])[name] for name in METRICS] == [0, 0, 0]


def test_rouge_l_and_bleu_by_hand():
    """Longest common subsequences "the cat on the mat" (5 of 5 words, 5 of 6) and "the cat mat" (3 of 5, 3 of 3): P = R = 1."""
    output, both = "the cat on the mat", ["The cat sat on the mat", "the cat, mat!"]
    assert nlg_scores([output], [both])["rouge_l"] == pytest.approx(100)
    recall = 5 / 6
    scores = nlg_scores([output], [both[:1]])
    assert scores["rouge_l"] == pytest.approx(100 * 2.44 * recall / (recall + 1.44))
    # n-grams found: 5 of 5, 3 of 4 (not "cat on"), 1 of 3 ("on the mat"), 0 of 2 smoothed to 1/2; brevity exp(1 - 6/5)
    assert scores["bleu"] == pytest.approx(100 * math.exp(1 - 6 / 5) * (1 * 3 / 4 * 1 / 3 * 1 / 4) ** 0.25)


def test_nist_is_nltks_where_there_is_one_reference():
    single = [own[:1] for own in REFERENCES]
    theirs = corpus_nist([[tokens(text) for text in own] for own in single], [tokens(text) for text in OUTPUTS])
    assert nlg_scores(OUTPUTS, single)["nist"] == pytest.approx(theirs)


def test_nist_of_several_references_by_hand():
    """Of "a a b", one a and b are found, each as often as in one reference, and "a b" of two pairs; a is 2 of all 3 words, b is 1."""
    by_hand = (math.log2(3 / 2) + math.log2(3 / 1)) / 3 + math.log2(2 / 1) / 2
    assert nlg_scores(["a a b"], [["a b", "a"]])["nist"] == pytest.approx(by_hand)


def test_order_of_references_and_case_do_not_matter_and_intervals_hold_the_value():
    scores = nlg_scores(OUTPUTS, REFERENCES)
    assert nlg_scores([text.upper() for text in OUTPUTS], [own[::-1] for own in REFERENCES]) == scores
    for name in METRICS:
        low, high = scores[f"{name}_interval"]
        assert low <= scores[name] <= high and low < high


@pytest.mark.parametrize(
    ("outputs", "references", "message"),
    [
        (["a"], [[]], r"references of input 0; expected one or more texts of at least a word; found \[\]"),
        (["a", "b"], [["a"], ["b", " . "]], "references of input 1"),
        (["a"], [["a"], ["b"]], "outputs; expected one for each of 2 inputs, at least 1; found 1"),
        ([], [], "outputs"),
    ],
)
def test_bad_input(outputs, references, message):
    with pytest.raises(MeetjaxError, match=message):
        nlg_scores(outputs, references)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "meetjax.evaluate.nlg")
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(MeetjaxError, match=r"pip install 'meetjax\[nlg\]'"):
        importlib.import_module("meetjax.evaluate.nlg")


def test_the_script_scores_what_the_recipe_holds_out(tmp_path, monkeypatch):
    """An answer that is any of the references is perfect, and none is to a meaning representation that trains."""
    with (tmp_path / "set.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("mr", "ref"), *((f"name[{i // 5}]", f"{i // 5} is pub no. {i % 5}.") for i in range(1000))])
    records, _ = read_records(tmp_path / "set.csv", "completion", columns=("mr", "ref"))
    train, _, _ = split_rows(records, 100)

    def generate_texts(model, requests, *, adapters, max_new_tokens, template):
        return [SimpleNamespace(text=f" {request.prompt[5:-1]} is pub no. {i % 5}.") for i, request in enumerate(requests)]

    monkeypatch.setattr(load_module, "load", lambda name: None)
    monkeypatch.setattr(requests_module, "generate_texts", generate_texts)
    monkeypatch.syspath_prepend(FOLDER)
    scores = load_experiment("e2e_scores").score(tmp_path / "set.csv", None, "", 20, 4)
    assert scores["n"] == len(scores["answers"]) == 20 and scores["bleu"] == pytest.approx(100) == scores["rouge_l"]
    assert not {record.prompt for record in train} & set(scores["answers"])
