"""BLEU, NIST and ROUGE-L of texts against several references each, by sacrebleu, nltk and rouge-score (the extra `nlg`).

They follow tuetschek/e2e-metrics, the scorer of the E2E table of RED (Wu et al. 2024, arXiv 2402.15179). On the outputs that its
authors published for the test set (630 inputs; GPT-2 medium and large with RED, then with RED+), beside what that scorer gives them:

* BLEU: mteval-v13a's, lower-cased, against the reference of the closest length, smoothed as there, which is sacrebleu's default but
  for the case. 65.00, 65.75, 66.68, 68.31 beside 65.01, 65.75, 66.68, 68.31.
* NIST: mteval-v13a's, where an n-gram counts as often as any one reference has it. nltk's `corpus_nist` takes the best single
  reference (6.99 for the first), so the sum is made here, from nltk's n-grams and length penalty; with one reference both agree.
  8.39, 8.42, 8.53, 8.78 beside 8.39, 8.42, 8.53, 8.78.
* ROUGE-L: coco-caption's F, with recall weighted by 1.2, of the best precision and the best recall among the references, which are
  rouge-score's. Words are mteval's; coco-caption's need Java. 67.5, 69.0, 69.5, 69.7 beside 67.6, 69.1, 69.6, 69.8.

Left out: METEOR, of which version 1.5 needs Java and nltk's another WordNet, a download; and CIDEr, which is in pycocoevalcap (100 MB
of Java archives, last released in 2020) and aac-metrics (needs torch).
"""

from __future__ import annotations

import functools
import math
import operator
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from meetjax.errors import MeetjaxError
from meetjax.evaluate.intervals import bootstrap, bootstrap_mean

try:
    from nltk.translate.nist_score import nist_length_penalty
    from nltk.util import everygrams
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
except ImportError as error:
    raise MeetjaxError("BLEU, NIST and ROUGE-L: missing package", found=error, fix="pip install 'meetjax[nlg]'") from error

ORDERS = 5  # of NIST's n-grams, as in mteval
BETA = 1.2  # weight of ROUGE-L's recall, as in coco-caption
mteval_tokenizer = Tokenizer13a()

Estimate = tuple[float, float, float]
"""A score and the ends of its interval."""


def nlg_scores(outputs: Sequence[str], references: Sequence[Sequence[str]], seed: int = 0) -> dict[str, Any]:
    """{"bleu", "bleu_interval", "nist", "nist_interval", "rouge_l", "rouge_l_interval", "n"} of an output for each of n inputs.

    references: of each input, one or more in any order. BLEU and ROUGE-L are percentages, NIST is bits. Intervals are 95 % bootstraps
    over inputs. Raises MeetjaxError for an input without a reference, and for a reference without a word.
    """
    if len(outputs) != len(references) or not outputs:
        raise MeetjaxError("outputs", expected=f"one for each of {len(references)} inputs, at least 1", found=len(outputs))
    for number, own in enumerate(references):
        if not own or not all(words(text) for text in own):
            raise MeetjaxError(f"references of input {number}", expected="one or more texts of at least a word", found=list(own))
    scores: dict[str, Any] = {"n": len(outputs)}
    for name, metric in (("bleu", _bleu), ("nist", _nist), ("rouge_l", _rouge_l)):
        scores[name], *scores[f"{name}_interval"] = metric(outputs, references, seed)
    return scores


def tokens(text: str) -> list[str]:
    """The tokens of mteval-v13a, lower-cased."""
    return mteval_tokenizer(text.lower()).split()


def words(text: str) -> list[str]:
    """The tokens that are more than punctuation."""
    return [token for token in tokens(text) if any(map(str.isalnum, token))]


def _bleu(outputs: Sequence[str], references: Sequence[Sequence[str]], seed: int) -> Estimate:
    scorer = BLEU(lowercase=True)
    parts = [scorer.corpus_score([output], [[text] for text in own]) for output, own in zip(outputs, references, strict=True)]
    counts = np.array([[part.counts, part.totals] for part in parts])  # [N, 2, 4]
    lengths = np.array([[part.sys_len, part.ref_len] for part in parts])

    def score(index: np.ndarray) -> float:
        return BLEU.compute_bleu(*counts[index].sum(0).tolist(), *lengths[index].sum(0).tolist(), smooth_method="exp").score

    return bootstrap(score, len(parts), seed)


def _nist(outputs: Sequence[str], references: Sequence[Sequence[str]], seed: int) -> Estimate:
    """NIST = penalty * sum over n of (information of the n-grams found) / (n-grams of the outputs), Doddington (2002), eq. 3.

    The information of w1..wn is log2(count of w1..wn-1 / count of w1..wn) in all references, also where inputs are resampled.
    """
    known = [[_grams(text) for text in own] for own in references]
    frequency: Counter[Any] = Counter(gram for own in known for grams in own for gram in grams.elements())
    frequency[()] = sum(count for gram, count in frequency.items() if len(gram) == 1)
    found = np.zeros((len(outputs), ORDERS))
    for row, (output, own) in enumerate(zip(outputs, known, strict=True)):
        for gram, count in (_grams(output) & functools.reduce(operator.or_, own)).items():
            found[row, len(gram) - 1] += count * math.log2(frequency[gram[:-1]] / frequency[gram])
    made = np.array([[max(len(tokens(output)) - n, 0) for n in range(ORDERS)] for output in outputs])
    lengths = np.array([np.mean([len(tokens(text)) for text in own]) for own in references])

    def score(index: np.ndarray) -> float:
        totals = made[index].sum(0)
        return (found[index].sum(0) / np.maximum(totals, 1)).sum() * nist_length_penalty(lengths[index].sum(), totals[0])

    return bootstrap(score, len(outputs), seed)


def _grams(text: str) -> Counter[Any]:
    return Counter(everygrams(tokens(text), max_len=ORDERS))


def _rouge_l(outputs: Sequence[str], references: Sequence[Sequence[str]], seed: int) -> Estimate:
    scorer = RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=words))
    values = []
    for output, own in zip(outputs, references, strict=True):
        found = [scorer.score(text, output)["rougeL"] for text in own]
        precision, recall = max(one.precision for one in found), max(one.recall for one in found)
        values.append(100 * (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision) if precision else 0.0)
    return bootstrap_mean(values, seed)
