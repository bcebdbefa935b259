"""Where answers start and end, what is cut, what is left out."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from meetjax.data.records import Completion, Instructed, Message, Pair, answers
from meetjax.data.template import render_prompt
from meetjax.data.tokenize import DEPENDS, TOO_LONG, answer_ids, distinct_tokens, laid_lengths, tokenize_records
from meetjax.errors import MeetjaxError
from meetjax.generate.requests import encode_prompt
from tests.conftest import CHAT

LONG = 10_000
FAST = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
words = st.text(alphabet="abcde é漢🙂.,\t", min_size=1, max_size=24).filter(str.strip)


def decode(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@FAST
@given(st.lists(st.tuples(words, words, words), min_size=1, max_size=5))
def test_the_answer_is_recovered_exactly_and_ends_in_eos(tokenizer, texts):
    records = [Pair((Message("user", p),), a, b, f"f:{i}") for i, (p, a, b) in enumerate(texts)]
    rows, audit = tokenize_records(records, tokenizer, LONG)
    assert len(rows) == audit.kept == len(records) and audit.excluded == {} == audit.noted
    for n, record in enumerate(records):
        assert (rows.common[n] == rows.starts[n]).all() and rows.records[n] == n
        for c, answer in enumerate(answers(record)):
            ids, start = answer_ids(rows, n, c), rows.starts[n, c]
            assert ids[-1] == tokenizer.eos_token_id and len(ids) == rows.lengths[n, c]
            assert decode(tokenizer, ids[:start]) == render_prompt(tokenizer, record.prompt)
            assert decode(tokenizer, ids[start:-1]) == answer
    assert audit.stats["tokens"] == rows.lengths.sum() == len(rows.ids)
    assert audit.stats["distinct tokens"] == rows.lengths.sum() - rows.starts[:, 0].sum()


@FAST
@given(words, words)
def test_without_a_template_each_text_is_tokenised_as_one_string(plain_tokenizer, prompt, answer):
    rows, audit = tokenize_records([Completion(prompt, answer, "f:1")], plain_tokenizer, LONG)
    encoding = plain_tokenizer(prompt + answer, add_special_tokens=False).encodings[0]
    assert answer_ids(rows, 0, 0).tolist() == [*encoding.ids, plain_tokenizer.eos_token_id]
    ends = [end for _, end in encoding.offsets]
    assert rows.starts[0, 0] == sum(end <= len(prompt) for end in ends)
    assert ("a token spans prompt and answer" in audit.noted) == (len(prompt) not in ends)


def metaspace_tokenizer(scheme):
    """A word-piece of blanks and letters, as SentencePiece has it, with a special token."""
    model = Tokenizer(BPE(unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=["<unk>", "<|end|>", "<|start|>"], show_progress=False)
    model.train_from_iterator(["abc de abcd ea", "assistant user bc"] * 4, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|end|>", unk_token="<unk>")
    made.chat_template = CHAT
    return made


METASPACE = {scheme: metaspace_tokenizer(scheme) for scheme in ("first", "always", "never")}
spelled = st.lists(words | st.sampled_from(["<|start|>", "<|end|>", "<|end", "<s>"]), min_size=1, max_size=4).map("".join)


@FAST
@given(spelled, spelled, spelled, st.sampled_from(["bytes", *METASPACE]))
def test_a_prompt_encoded_once_gives_the_ids_of_the_whole_text(tokenizer, prompt, chosen, rejected, kind):
    chosen_by = METASPACE.get(kind, tokenizer)
    record = Pair((Message("user", prompt),), chosen, rejected, "f:1")
    rows, _ = tokenize_records([record], chosen_by, LONG)
    for c, answer in enumerate(answers(record)):
        whole = chosen_by(render_prompt(chosen_by, record.prompt) + answer, add_special_tokens=False)["input_ids"]
        assert answer_ids(rows, 0, c).tolist() == [*whole, chosen_by.eos_token_id]


@FAST
@given(words, st.sampled_from(["", " ", "\n\n", " \t "]), words)
def test_offsets_without_blanks_give_the_same_rows(plain_tokenizer, trimming_tokenizer, prompt, blank, answer):
    records = [Completion(f"{prompt}|", blank + answer, "f:1")]
    rows, _ = tokenize_records(records, plain_tokenizer, LONG)
    trimmed, _ = tokenize_records(records, trimming_tokenizer, LONG)
    assert np.array_equal(rows.starts, trimmed.starts) and np.array_equal(rows.ids, trimmed.ids)
    assert decode(trimming_tokenizer, answer_ids(trimmed, 0, 0)[trimmed.starts[0, 0] : -1]) == blank + answer


def test_a_token_across_the_boundary_belongs_to_the_answer(plain_tokenizer):
    assert len(plain_tokenizer("the", add_special_tokens=False).input_ids) == 1
    rows, audit = tokenize_records([Pair("the mat t", "he cat", "x", "f:1")], plain_tokenizer, LONG)
    assert decode(plain_tokenizer, answer_ids(rows, 0, 0)[rows.starts[0, 0] : -1]).endswith("the cat")
    assert decode(plain_tokenizer, answer_ids(rows, 0, 1)[rows.starts[0, 1] : -1]) == "x"
    assert rows.common[0] < rows.starts[0].max()
    assert np.array_equal(answer_ids(rows, 0, 0)[: rows.common[0]], answer_ids(rows, 0, 1)[: rows.common[0]])
    assert set(audit.noted) == {"a token spans prompt and answer", "the two prompts differ in tokens"}
    assert distinct_tokens(rows) == rows.lengths.sum() - rows.common[0] == laid_lengths(rows).sum()


def test_a_marker_is_followed_by_what_training_lets_it_be_followed_by(plain_tokenizer):
    """A blank at its end is in the answer's first token there, so here it is for the model to say."""
    rows, _ = tokenize_records([Completion("the dog", "cat", "f:1")], plain_tokenizer, 40, markers=("good: ",))
    context = rows.ids[: rows.starts[0, 0]].tolist()
    assert encode_prompt(plain_tokenizer, "the dog", marker="good: ") == context == plain_tokenizer("the doggood:").input_ids


@pytest.mark.parametrize("prompt", ["the cat", "<s>the cat"])
def test_one_bos_never_two(bos_tokenizer, bos_chat_tokenizer, plain_tokenizer, prompt):
    bos = bos_tokenizer.bos_token_id
    for tokenizer in (bos_tokenizer, bos_chat_tokenizer):
        rows, _ = tokenize_records([Completion(prompt, "sat", "f:1")], tokenizer, LONG, template="none")
        ids = answer_ids(rows, 0, 0)
        assert ids[0] == bos and (ids == bos).sum() == 1
        assert decode(tokenizer, ids[rows.starts[0, 0] : -1]) == "sat"
    rows, _ = tokenize_records([Completion("the cat", "sat", "f:1")], bos_chat_tokenizer, LONG)
    assert (answer_ids(rows, 0, 0) == bos).sum() == 1 and answer_ids(rows, 0, 0)[0] == bos
    rows, _ = tokenize_records([Completion("the cat", "sat", "f:1")], plain_tokenizer, LONG)
    assert bos not in answer_ids(rows, 0, 0)


@FAST
@given(st.lists(st.tuples(words, words, words), min_size=1, max_size=6), st.integers(5, 40))
def test_cutting_takes_the_same_start_of_the_prompt_from_both_answers(bos_tokenizer, texts, max_length):
    records = [Pair(f"{p}|", a, b, f"f:{i}") for i, (p, a, b) in enumerate(texts)]
    whole, _ = tokenize_records(records, bos_tokenizer, LONG)
    fits = [
        whole.lengths[n].max() - max_length <= whole.starts[n].min() - 2 or whole.lengths[n].max() <= max_length for n in range(len(whole))
    ]
    if not any(fits):
        with pytest.raises(MeetjaxError, match=r"no row is usable.*does not fit"):
            tokenize_records(records, bos_tokenizer, max_length)
        return
    rows, audit = tokenize_records(records, bos_tokenizer, max_length)
    assert rows.records.tolist() == [n for n, fit in enumerate(fits) if fit]
    assert {reason: f.count for reason, f in audit.excluded.items()} == (
        {"an answer does not fit within max_length": fits.count(False)} if not all(fits) else {}
    )
    cut = 0
    for n, source in enumerate(rows.records):
        over = max(0, int(whole.lengths[source].max()) - max_length)
        cut += over > 0
        assert rows.common[n] >= whole.common[source] - over and rows.lengths[n].max() <= max_length
        for c in range(2):
            full = answer_ids(whole, source, c)
            assert answer_ids(rows, n, c).tolist() == [full[0], *full[1 + over :]]
            assert rows.starts[n, c] == whole.starts[source, c] - over >= 1 + (over > 0)
    noted = audit.noted.get("start of the prompt cut")
    assert (noted.count if noted else 0) == cut


def test_bos_written_by_the_template_survives_the_cut(bos_chat_tokenizer):
    record = Completion("the cat sat on the mat " * 20, "a short answer", "f:1")
    rows, _ = tokenize_records([record], bos_chat_tokenizer, 40)
    ids = answer_ids(rows, 0, 0)
    assert rows.lengths[0, 0] == 40 and ids[0] == bos_chat_tokenizer.bos_token_id
    assert decode(bos_chat_tokenizer, ids[rows.starts[0, 0] : -1]) == "a short answer"


def test_rows_left_out_are_counted_by_reason(tokenizer, plain_tokenizer):
    asked = (Message("user", "q"),)
    records = [
        Pair(asked, "yes", " ", "f:1"),
        Pair((Message("user", "a"), Message("user", "b")), "yes", "no", "f:2"),
        Pair(asked, "yes", "no " * 50, "f:3"),
        Pair(asked, "yes", "no<|end|>", "f:4"),
        Pair(asked, "yes", "half \ud83d", "f:5"),
    ]
    rows, audit = tokenize_records(records, tokenizer, 40)
    assert rows.records.tolist() == [3]
    assert {reason: (f.count, f.where) for reason, f in audit.excluded.items()} == {
        "empty answer": (1, "f:1"),
        "the chat template refuses the prompt": (1, "f:2"),
        "an answer does not fit within max_length": (1, "f:3"),
        "half a character (a lone surrogate)": (1, "f:5"),
    }
    assert {reason: f.where for reason, f in audit.noted.items()} == {"an answer spells a special token": "f:4"}
    _, audit = tokenize_records([Completion("", "a", "f:1"), Completion("q", "a", "f:2")], plain_tokenizer, 40)
    assert {reason: f.where for reason, f in audit.excluded.items()} == {"no prompt token before the answer": "f:1"}


def test_a_prompt_that_counts_as_a_whole_is_never_cut(tokenizer):
    long, short = (Pair((Message("user", "the goal " + "cat " * n),), "yes", "no", f"f:{n}") for n in (60, 1))
    rows, audit = tokenize_records([long, short], tokenizer, 40, whole=True)
    assert rows.records.tolist() == [1] and {r: f.where for r, f in audit.excluded.items()} == {TOO_LONG: "f:60"}
    assert tokenize_records([long, short], tokenizer, 40)[0].records.tolist() == [0, 1]


def test_an_answer_whose_tokens_depend_on_the_instruction_is_left_out(plain_tokenizer):
    """RAHF compares states token by token, so an answer has to be the same tokens behind every prompt."""
    asked = [Instructed((first, "the mat s"), "he cat", 1, f"f:{first}") for first in ("the mat t", "the mat x")]
    rows, audit = tokenize_records(asked, plain_tokenizer, LONG)
    assert rows.records.tolist() == [1] and {r: f.where for r, f in audit.excluded.items()} == {DEPENDS: "f:the mat t"}
    whole = [answer_ids(rows, 0, c)[rows.starts[0, c] :].tolist() for c in range(2)]
    assert whole[0] == whole[1]


def test_hashes_name_the_content(tokenizer):
    records = [Completion("q", "a", "f:1"), Completion("q", "a", "g:7"), Completion("q", "b", "f:2"), Completion("r", "a", "f:3")]
    hashes = tokenize_records(records, tokenizer, LONG)[0].hashes.tolist()
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3 and all(len(h) == 16 for h in hashes)
    assert tokenize_records(records[2:], tokenizer, LONG)[0].hashes.tolist() == hashes[2:], "a hash must not depend on the other rows"


def test_hashes_tell_where_the_prompt_ends(plain_tokenizer):
    rows, _ = tokenize_records([Completion(".", ".,", "f:1"), Completion("..", ",", "f:2")], plain_tokenizer, LONG)
    assert np.array_equal(answer_ids(rows, 0, 0), answer_ids(rows, 1, 0)) and rows.starts[:, 0].tolist() == [1, 2]
    assert rows.hashes[0] != rows.hashes[1]


def test_pad_id_does_not_matter(tokenizer):
    records = [Completion("q", "a", "f:1")]
    before = tokenize_records(records, tokenizer, LONG)[0]
    padded = copy.deepcopy(tokenizer)
    for pad in ("<|end|>", "a"):
        padded.pad_token = pad
        assert np.array_equal(tokenize_records(records, padded, LONG)[0].ids, before.ids)


def test_truncation_left_on_in_the_tokenizer_is_not_applied(plain_tokenizer):
    limited = copy.deepcopy(plain_tokenizer)
    limited.backend_tokenizer.enable_truncation(4)
    rows, _ = tokenize_records([Completion("the cat sat", " on the mat", "f:1")], limited, LONG)
    assert decode(limited, answer_ids(rows, 0, 0)[:-1]) == "the cat sat on the mat"


def test_progress_reaches_the_total(tokenizer, monkeypatch):
    monkeypatch.setattr("meetjax.data.tokenize.CHUNK", 2)
    seen = []
    rows, _ = tokenize_records([Completion("q", f"a{i}", "f") for i in range(5)], tokenizer, LONG, progress=lambda *at: seen.append(at))
    assert seen == [(2, 5), (4, 5), (5, 5)] and rows.records.tolist() == [0, 1, 2, 3, 4]


def test_errors(tokenizer, plain_tokenizer, eosless_tokenizer):
    one = [Completion("q", "a", "f:1")]
    with pytest.raises(MeetjaxError, match="expected at least one"):
        tokenize_records([], tokenizer, LONG)
    with pytest.raises(MeetjaxError, match="one form; found Completion and Pair"):
        tokenize_records([*one, Pair("q", "a", "b", "f:2")], tokenizer, LONG)
    with pytest.raises(MeetjaxError, match="max_length"):
        tokenize_records(one, tokenizer, 2)
    with pytest.raises(MeetjaxError, match="EOS"):
        tokenize_records(one, eosless_tokenizer, LONG)
    with pytest.raises(MeetjaxError, match="found 'chatml'"):
        tokenize_records(one, tokenizer, LONG, template="chatml")
    with pytest.raises(MeetjaxError, match="a conversation of 1 messages"):
        tokenize_records([Completion((Message("user", "q"),), "a", "f:1")], plain_tokenizer, LONG)
    with pytest.raises(MeetjaxError, match=r"tokenised records: no row is usable.*empty answer.*f:1"):
        tokenize_records([Completion("q", "", "f:1")], tokenizer, LONG)

    class Slow:
        is_fast, eos_token_id, chat_template = False, 1, None

    with pytest.raises(MeetjaxError, match=r"expected a fast tokenizer.*found Slow"):
        tokenize_records(one, Slow(), LONG)
