"""Text as it becomes certain: put together, the pieces are the answer up to its first stop text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meetjax.serve.text import BROKEN, Writer
from tests.conftest import CHAT, build_tokenizer

TOKENIZER = build_tokenizer(adds_bos=False, chat=CHAT)
TEXTS = st.text(st.sampled_from("ab é猫🙂 the"), max_size=20)


def written(ids, stop):
    """(pieces, whether a stop text ended it)."""
    writer, pieces = Writer(TOKENIZER, stop), []
    for token in ids:
        text, stopped = writer.add(token)
        pieces.append(text)
        if stopped:
            return pieces, True
    text, stopped = writer.end()
    return [*pieces, text], stopped


@given(text=TEXTS, stop=st.lists(st.text(st.sampled_from("ab é猫🙂"), min_size=1, max_size=3), max_size=3))
def test_pieces_are_the_text_up_to_its_first_stop(text, stop):
    pieces, stopped = written(TOKENIZER.encode(text, add_special_tokens=False), stop)
    found = [text.find(s) for s in stop if s in text]
    assert stopped == bool(found)
    joined = "".join(pieces)
    assert joined == (text[: min(found)] if found else text)
    assert all(BROKEN not in piece for piece in pieces)


@given(ids=st.lists(st.integers(3, 258), max_size=12))
def test_bytes_that_are_no_text_come_out_as_the_tokenizer_writes_them(ids):
    """Without a stop text the pieces add up to what decoding everything at once gives."""
    assert "".join(written(ids, ())[0]) == TOKENIZER.decode(ids)


@pytest.mark.parametrize(("stop", "said"), [(("cat sat",), "the "), (("sat", "cat"), "the "), (("mat!",), "the cat sat on the mat")])
def test_a_stop_text_may_span_tokens_and_may_not_come(stop, said):
    pieces, stopped = written(TOKENIZER.encode("the cat sat on the mat"), stop)
    assert "".join(pieces) == said
    assert stopped == (said == "the ")
