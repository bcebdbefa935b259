"""Tokenizers rebuilt from GGUF metadata: how text is split, special tokens, offsets, templates, SentencePiece."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meetjax.errors import MeetjaxError
from meetjax.models.config import ModelConfig
from meetjax.models.gguf_tokenizer import make_tokenizer, spm_merges

CONFIG = ModelConfig("llama", vocab=400, width=8, hidden=8, layers=1, heads=1, kv_heads=1, head_width=8, max_position=128)
TEMPLATE = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_alphabet() -> list[str]:
    """The 256 characters that byte-level BPE writes bytes with: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def metadata(pre: str = "smollm", **keys) -> dict:
    merges = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2", "12 3", "' S"]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *byte_alphabet(), *(merge.replace(" ", "") for merge in merges), "<think>"]
    base = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "merges": merges,
        "token_type": [3] * 3 + [1] * (len(tokens) - 4) + [4],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "padding_token_id": 2,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (base | keys).items()} | {"tokenizer.chat_template": TEMPLATE}


def tokenizer_of(pre: str = "smollm", **keys):
    return make_tokenizer(metadata(pre, **keys), CONFIG, "a.gguf")


def error_of(call) -> str:
    with pytest.raises(MeetjaxError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "It's 12 a\n\n b", ["It", "'s", " ", "1", "2", " a", "\n\n", " b"]),
        ("smollm", "x½٣  y!?", ["x", "½", "٣", " ", " y", "!?"]),
        ("gpt-2", "It's 12 a\n\n b", ["It", "'s", " 12", " a", "\n\n", " b"]),
        ("qwen2", "IT'S 12 a\n\n b", ["IT", "'S", " ", "1", "2", " a", "\n\n", " b"]),
        ("qwen2", "(foo) ...\nx", ["(foo", ")", " ...\n", "x"]),
        ("llama-bpe", "I'LL 12345 a", ["I", "'LL", " ", "123", "45", " a"]),
        ("default", "It's 12345 a.b", ["It", "'", "s", " ", "123", "45", " a", ".", "b"]),
    ],
)
def test_text_is_split_as_in_training(pre, text, pieces):
    back = {char: byte for byte, char in enumerate(byte_alphabet())}
    found = tokenizer_of(pre).backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [bytes(back[char] for char in piece).decode() for piece, _ in found] == pieces


def test_digits_do_not_merge_across_splits():
    assert tokenizer_of("smollm").tokenize("123") == ["1", "2", "3"]
    assert tokenizer_of("llama-bpe").tokenize("123") == ["123"]


def test_only_llama_bpe_takes_whole_words_without_merges():
    merges = [merge for merge in metadata()["tokenizer.ggml.merges"] if merge != "hell o"]
    assert tokenizer_of("llama-bpe", merges=merges).tokenize("hello") == ["hello"]
    assert tokenizer_of("smollm", merges=merges).tokenize("hello") == ["hell", "o"]


def test_special_tokens_are_whole_and_named():
    tokenizer = tokenizer_of()
    assert tokenizer("<|im_start|>").input_ids == [1]
    ids = tokenizer("hello<|im_end|><think> hello").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["hello", "<|im_end|>", "<think>", "Ġhello"]
    assert tokenizer.decode(ids) == "hello<|im_end|><think> hello"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello<think> hello"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id) == (1, 2, 0, 2)
    assert len(tokenizer) == len(metadata()["tokenizer.ggml.tokens"]) and tokenizer.model_max_length == 128


@pytest.mark.parametrize("pre", ["smollm", "qwen2", "llama-bpe", "default"])
@given(text=st.text(max_size=40))
@settings(max_examples=40, deadline=None)
def test_round_trip_and_offsets(pre, text):
    tokenizer = CACHE.setdefault(pre, tokenizer_of(pre, add_bos_token=False))
    encoded = tokenizer(text, return_offsets_mapping=True)
    decoded = tokenizer.decode(encoded.input_ids)
    expected = tokenizer.backend_tokenizer.normalizer.normalize_str(text) if pre == "qwen2" else text
    assert decoded == expected
    covered = {i for start, end in encoded.offset_mapping for i in range(start, end)}
    assert covered == set(range(len(text)))


CACHE: dict = {}


def test_chat_template():
    tokenizer = tokenizer_of()
    messages = [{"role": "user", "content": "hello"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == tokenizer(text, add_special_tokens=False).input_ids and ids.count(1) == 2 and ids.count(2) == 1


@pytest.mark.parametrize(
    ("pre", "keys", "starts", "ends"),
    [
        ("smollm", {}, False, False),
        ("smollm", {"add_bos_token": True}, True, False),
        ("smollm", {"add_eos_token": True}, False, True),
        ("llama-bpe", {}, True, False),
        ("llama-bpe", {"add_bos_token": False}, False, False),
    ],
)
def test_bos_and_eos_flags(pre, keys, starts, ends):
    tokenizer = tokenizer_of(pre, **keys)
    ids = tokenizer("hello").input_ids
    assert (ids[0] == 1, ids[-1] == 2) == (starts, ends)
    assert tokenizer("hello", add_special_tokens=False).input_ids == ids[starts : len(ids) - ends]


def test_errors_name_the_key():
    assert "tokenizer.ggml.pre" in error_of(lambda: tokenizer_of("unheard-of"))
    assert "tokenizer.ggml.model" in error_of(lambda: tokenizer_of(model="bert"))
    assert "bos_token_id" in error_of(lambda: tokenizer_of(bos_token_id=9999))
    assert "token_type" in error_of(lambda: tokenizer_of(token_type=[1]))
    assert "distinct" in error_of(lambda: tokenizer_of(tokens=["a", "a"], token_type=[1, 1], merges=[]))
    assert "tokenizer.ggml.tokens" in error_of(lambda: tokenizer_of(tokens=None))
    assert "scores" in error_of(lambda: tokenizer_of(model="llama"))
    message = error_of(lambda: tokenizer_of(merges=["h zz"]))
    assert "a.gguf" in message and "merges" in message


SPM_PIECES = [  # piece, score, type
    ("<unk>", 0.0, 2),
    ("<s>", 0.0, 3),
    ("</s>", 0.0, 3),
    *((f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)),
    ("ab", -1.0, 1),
    ("bc", -2.0, 1),
    ("▁a", -0.5, 1),
    ("abc", -3.0, 1),
    ("▁", -10.0, 1),
    *((letter, -11.0, 1) for letter in "abc"),
]


def spm_tokenizer(**keys):
    tokens, scores, types = (list(column) for column in zip(*SPM_PIECES, strict=True))
    base = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": types, "bos_token_id": 1, "eos_token_id": 2}
    return make_tokenizer({f"tokenizer.ggml.{key}": value for key, value in (base | keys).items()}, CONFIG, "a.gguf")


def test_sentencepiece_joins_the_best_piece_first():
    tokenizer = spm_tokenizer()
    # "▁abc": the best neighbour pair is "▁a" (-0.5), before "ab" (-1); then "bc".
    assert tokenizer.convert_ids_to_tokens(tokenizer("abc").input_ids) == ["<s>", "▁a", "bc"]
    # "▁cab": "ab" (-1) wins; nothing joins "▁c".
    assert tokenizer.tokenize("cab") == ["▁", "c", "ab"]


def test_sentencepiece_falls_back_to_bytes_and_round_trips():
    tokenizer = spm_tokenizer()
    assert tokenizer.tokenize("é") == ["▁", "<0xC3>", "<0xA9>"]
    for text in ("abc", " a  b", "é🙂 abc\n"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
    # Each stretch of text between special tokens gets its own leading space, as in llama.cpp.
    assert tokenizer.tokenize("cab</s>a") == ["▁", "c", "ab", "</s>", "▁a"]


def test_sentencepiece_without_prefix_and_bos():
    tokenizer = spm_tokenizer(add_space_prefix=False, add_bos_token=False)
    assert tokenizer.tokenize("abc") == ["abc"]
    assert tokenizer.decode(tokenizer(" abc").input_ids) == " abc"


def test_sentencepiece_merges_are_in_order_of_score():
    merges = spm_merges(["a", "b", "ab", "ba", "<s>"], [-9.0, -9.0, -2.0, -1.0, 0.0], [1, 1, 1, 1, 3])
    assert merges == [("b", "a"), ("a", "b")]
