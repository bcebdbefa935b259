"""The tokenizer that a GGUF file describes: vocabulary, merges, special tokens and chat template from its metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from meetjax.errors import MeetjaxError
from meetjax.models.config import ModelConfig

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Values of tokenizer.ggml.token_type."""

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {  # tokenizer.ggml.pre -> patterns applied one after the other, each match a piece of its own
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (GPT2_WORDS,),
    "smollm": (r"\p{N}", GPT2_WORDS),
    "qwen2": (_WORDS % "",),
    "llama-bpe": (_WORDS % "{1,3}",),
}


def _byte_level(meta: Mapping[str, Any], tokens: list[str], where: str) -> Tokenizer:
    pre = meta.get("tokenizer.ggml.pre")
    if pre not in SPLITS:
        raise MeetjaxError(
            f"{where}: metadata key tokenizer.ggml.pre",
            expected=" or ".join(SPLITS),
            found=pre,
            fix="load the Hugging Face folder of this model instead",
        )
    vocab, merges = {token: i for i, token in enumerate(tokens)}, []
    for merge in meta.get("tokenizer.ggml.merges", ()):
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise MeetjaxError(
                f"{where}: metadata key tokenizer.ggml.merges", expected="pairs of tokens whose union is a token", found=merge
            )
        merges.append((left, right))
    # llama-bpe: a whole word of the vocabulary is one token even where no merge leads to it.
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in SPLITS[pre]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def spm_merges(tokens: list[str], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """BPE merges equal to SentencePiece's rule: join the neighbours whose union is the piece of the highest score."""
    known = {token for token, kind in zip(tokens, types, strict=True) if kind in (NORMAL, USER_DEFINED, UNUSED)}
    ranked = sorted((-score, i) for i, (score, token) in enumerate(zip(scores, tokens, strict=True)) if token in known)
    return [
        (tokens[i][:cut], tokens[i][cut:])
        for _, i in ranked
        for cut in range(1, len(tokens[i]))
        if tokens[i][:cut] in known and tokens[i][cut:] in known
    ]


def _sentencepiece(meta: Mapping[str, Any], tokens: list[str], types: list[int], where: str) -> Tokenizer:
    scores = meta.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise MeetjaxError(f"{where}: metadata key tokenizer.ggml.scores", expected=f"{len(tokens)} numbers", found=scores and len(scores))
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    merges = spm_merges(tokens, scores, types)
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = meta.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    decode = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*decode, decoders.Strip(" ", 1, 0)] if prefix else decode)
    return tokenizer


def _special(meta: Mapping[str, Any], tokens: list[str], where: str) -> dict[str, str]:
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {}
    for name, key in names.items():
        token_id = meta.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is None:
            continue
        if not 0 <= token_id < len(tokens):
            raise MeetjaxError(f"{where}: metadata key tokenizer.ggml.{key}_token_id", expected=f"below {len(tokens)}", found=token_id)
        special[name] = tokens[token_id]
    return special


def make_tokenizer(meta: Mapping[str, Any], config: ModelConfig, where: str) -> Any:
    """A `PreTrainedTokenizerFast` with the special tokens, BOS flag and chat template of the file.

    Control tokens are special (whole in text, dropped by `skip_special_tokens`), user-defined ones whole only. Offsets of a
    piece include its leading space, so they tile the text. Raises MeetjaxError for an unknown or inconsistent vocabulary.
    """
    from transformers import PreTrainedTokenizerFast

    family, tokens = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise MeetjaxError(f"{where}: metadata key tokenizer.ggml.tokens", expected="a list of tokens", found=type(tokens).__name__)
    if len(set(tokens)) != len(tokens) or len(tokens) > config.vocab:
        raise MeetjaxError(
            f"{where}: metadata key tokenizer.ggml.tokens",
            expected=f"at most {config.vocab} distinct tokens, the rows of token_embd.weight",
            found=f"{len(tokens)} tokens, {len(set(tokens))} distinct",
        )
    types = meta.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise MeetjaxError(f"{where}: metadata key tokenizer.ggml.token_type", expected=f"{len(tokens)} values", found=len(types))
    if family == "gpt2":
        tokenizer = _byte_level(meta, tokens, where)
    elif family == "llama":
        tokenizer = _sentencepiece(meta, tokens, types, where)
    else:
        raise MeetjaxError(f"{where}: metadata key tokenizer.ggml.model", expected="gpt2 or llama", found=family)
    marked = [(token, kind == CONTROL) for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token, special in marked])
    # Files that do not say: SentencePiece models and Llama 3 start a text with BOS.
    starts = family == "llama" or meta.get("tokenizer.ggml.pre") == "llama-bpe"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        add_bos_token=meta.get("tokenizer.ggml.add_bos_token", starts),
        add_eos_token=meta.get("tokenizer.ggml.add_eos_token", False),
        chat_template=meta.get("tokenizer.chat_template"),
        model_max_length=config.max_position,
        clean_up_tokenization_spaces=False,
        **_special(meta, tokens, where),
    )
    if len(fast) != len(tokens):
        raise MeetjaxError(f"{where}: special tokens outside the vocabulary", expected=f"{len(tokens)} tokens", found=len(fast))
    return fast
