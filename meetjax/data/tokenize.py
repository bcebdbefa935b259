"""From records to token rows: each answer is tokenised with its prompt, as one text, and split from it by character offsets."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from meetjax.data.audit import Audit, Finding, require_rows, tally
from meetjax.data.records import EMPTY, Instructed, Labelled, Record, answers, prompts
from meetjax.data.template import TemplateRefusal, check_template, render_prompt
from meetjax.errors import MeetjaxError
from meetjax.types import Tokenizer

CHUNK = 1024  # records handed to the tokenizer at once; it works on their texts in parallel

HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair: JSON can say it, UTF-8 and tokenizers cannot

BROKEN = "half a character (a lone surrogate)"
REFUSED = "the chat template refuses the prompt"
NO_CONTEXT = "no prompt token before the answer"
TOO_LONG = "an answer does not fit within max_length"
CUT = "start of the prompt cut"
STRADDLED = "a token spans prompt and answer"
UNEQUAL = "the two prompts differ in tokens"
DEPENDS = "the answer's tokens depend on the instruction"
SPELLED = "an answer spells a special token"


@dataclasses.dataclass(frozen=True)
class Rows:
    """N rows of C tokenised answers in flat storage; row [n, c] is prompt + answer + EOS, unpadded.

    ids:      int32[sum of lengths], read with `answer_ids`
    offsets:  int64[N, C], where row [n, c] begins in `ids`
    starts:   int32[N, C], tokens of the prompt, i.e. index of the first answer token
    lengths:  int32[N, C], tokens, EOS included
    common:   int32[N], tokens at the front of the prompt that are the same for all C answers
    hashes:   str[N], 16 hex digits that name the row's content (for caches)
    records:  int32[N], index of the row's record in the list that was tokenised
    classes:  int32[N], labels of labelled records, or None
    token_weights: float32[sum of lengths], a weight of each of `ids`, or None
    gates:    float32[N, A], the row's gate on each bank column, or None for 1 everywhere
    shared_prompt: whether batches lay the answers of a row behind one copy of `common`, or each behind its own
    """

    ids: Int[np.ndarray, " total"]
    offsets: Int[np.ndarray, "N C"]
    starts: Int[np.ndarray, "N C"]
    lengths: Int[np.ndarray, "N C"]
    common: Int[np.ndarray, " N"]
    hashes: np.ndarray
    records: Int[np.ndarray, " N"]
    classes: Int[np.ndarray, " N"] | None = None
    gates: Float[np.ndarray, "N A"] | None = None
    token_weights: Float[np.ndarray, " total"] | None = None
    shared_prompt: bool = True

    def __len__(self) -> int:
        return len(self.starts)


def answer_ids(rows: Rows, n: int, c: int) -> Int[np.ndarray, " length"]:
    """A view of the ids of prompt + answer + EOS of row n, answer c."""
    begin = rows.offsets[n, c]
    return rows.ids[begin : begin + rows.lengths[n, c]]


def tokenize_records(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    max_length: int,
    template: Literal["auto", "chat", "none"] = "auto",
    progress: Callable[[int, int], None] | None = None,
    markers: tuple[str, ...] = (),
    whole: bool = False,
) -> tuple[Rows, Audit]:
    """Tokenises all records with a fast tokenizer; returns the rows and the audit of what was cut and left out.

    A token belongs to the answer if it ends after the prompt's last character. EOS is appended and learned. No other special
    token is added, but a BOS where the tokenizer adds one itself and the text does not begin with it. Where an answer
    is longer than `max_length` tokens, the start of the prompt (after BOS) is cut by the same number of tokens for all
    answers of the record; the record is left out when that would leave no prompt token, or when `whole` says that the start counts
    (it always does for instructed records). `progress(done, total)` is called after every chunk of records. `markers`: text
    between prompt and answer, not learned, by the class of labelled records; other records take the only one. Stats: `tokens`
    (all rows), `distinct tokens` (an equal prompt counted once a record).
    Raises MeetjaxError for no records, records of two forms, a slow tokenizer, one without EOS, an unfit template, a `max_length`
    below 3, and when no record is left.
    """
    _check(records, tokenizer, max_length, template)
    excluded: dict[str, Finding] = {}
    noted: dict[str, Finding] = {}
    bos = added_bos(tokenizer)
    special = set(tokenizer.all_special_ids)
    hard = _hard_tokens(tokenizer)
    kept: list[tuple[int, list[np.ndarray], list[int]]] = []
    for first in range(0, len(records), CHUNK):
        chunk = list(enumerate(records[first : first + CHUNK], start=first))
        rendered = []
        for index, record in chunk:
            if not all(answer.strip() for answer in answers(record)):
                tally(excluded, EMPTY, record.where)
                continue
            try:
                texts = [render_prompt(tokenizer, prompt, template) + _marker(record, markers) for prompt in prompts(record)]
                if any(map(HALF.search, [*texts, *answers(record)])):
                    tally(excluded, BROKEN, record.where)
                    continue
                rendered.append((index, record, texts if len(texts) > 1 else texts * len(answers(record))))
            except TemplateRefusal:
                tally(excluded, REFUSED, record.where)
        cuts = {text: _last_end(hard, text) for _, _, texts in rendered for text in texts}
        fronts = list(dict.fromkeys(text[:cut] for text, cut in cuts.items()))
        known = {front: encoding.ids for front, encoding in zip(fronts, _encode(tokenizer, fronts), strict=True)}
        rests = [text[cuts[text] :] + answer for _, record, texts in rendered for text, answer in zip(texts, answers(record), strict=True)]
        encoded = iter(_encode(tokenizer, rests))
        for index, record, texts in rendered:
            sides = [
                _ids_and_start(known[text[: cuts[text]]], next(encoded), len(text) - cuts[text], bos, tokenizer.eos_token_id)
                for text in texts
            ]
            row, reason, remarks = _fit(sides, tokenizer.bos_token_id, special, max_length, isinstance(record, Instructed), whole)
            for remark in remarks:
                tally(noted, remark, record.where)
            if row is None:
                tally(excluded, reason, record.where)
            else:
                kept.append((index, *row))
        if progress is not None:
            progress(first + len(chunk), len(records))
    require_rows(Audit(len(kept), excluded), "tokenised records")
    rows = make_rows(kept)
    if isinstance(records[0], Labelled | Instructed):
        labels = np.array([records[n].label for n in rows.records], np.int32)
        rows = dataclasses.replace(rows, classes=labels)
    stats = {"tokens": int(rows.lengths.sum()), "distinct tokens": distinct_tokens(rows)}
    return rows, Audit(len(rows), excluded, noted, stats)


def _marker(record: Record, markers: tuple[str, ...]) -> str:
    if not markers:
        return ""
    label = record.label if isinstance(record, Labelled | Instructed) else 0 if len(markers) == 1 else -1
    if not 0 <= label < len(markers):
        found = f"{len(markers)} for class {label} at {record.where}" if label >= 0 else f"{len(markers)} for records without a class"
        raise MeetjaxError("tokenize: markers", expected="one for each class, or one for records without", found=found)
    return markers[label]


def added_bos(tokenizer: Tokenizer) -> int | None:
    """The id of BOS if the tokenizer puts one before every text by itself, else None."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a", verbose=False).input_ids[:1] == [bos] else None


def distinct_tokens(rows: Rows) -> int:
    """Tokens of all rows when what the answers of a row have in common is counted once."""
    return int(rows.lengths.sum() - rows.common.sum() * (rows.starts.shape[1] - 1))


def laid_lengths(rows: Rows) -> Int[np.ndarray, "N K"]:
    """Tokens of the K rows of a batch that each row becomes: one where the prompt is shared, else one an answer."""
    if not rows.shared_prompt:
        return rows.lengths
    common = rows.common[:, None]
    return common + (rows.lengths - common).sum(axis=1, keepdims=True, dtype=np.int32)


def _check(records: Sequence[Any], tokenizer: Tokenizer, max_length: int, template: str) -> None:
    if not records:
        raise MeetjaxError("tokenize: records", expected="at least one", found="none")
    forms = {type(record).__name__ for record in records}
    if len(forms) > 1:
        raise MeetjaxError("tokenize: records", expected="records of one form", found=" and ".join(sorted(forms)))
    if max_length < 3:
        raise MeetjaxError("tokenize: max_length", expected="at least 3 tokens (prompt, answer, EOS)", found=max_length)
    if not tokenizer.is_fast:
        raise MeetjaxError("tokenize: tokenizer", expected="a fast tokenizer (character offsets)", found=type(tokenizer).__name__)
    if tokenizer.eos_token_id is None:
        raise MeetjaxError("tokenize: tokenizer", expected="an EOS token", found="none", fix="set tokenizer.eos_token")
    check_template(tokenizer, template)


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[Any]:
    if not texts:
        return []
    found = tokenizer(texts, add_special_tokens=False, truncation=False, padding=False, return_attention_mask=False, verbose=False)
    return found.encodings


def _hard_tokens(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Matches added tokens at which any text is split before all else: what stands behind one is encoded as if alone.

    So a prompt up to its last one, most of it where a chat template made it, is encoded once for all its answers. None where there
    are none, or where the tokenizer treats the beginning of a text differently.
    """
    added = [token for token in tokenizer.added_tokens_decoder.values() if not (token.normalized or token.lstrip or token.rstrip)]
    contents = sorted((re.escape(token.content) for token in added if not token.single_word), key=len, reverse=True)
    first_differs = "prepend_scheme=first" in str(tokenizer.backend_tokenizer.pre_tokenizer)
    return None if first_differs or not contents else re.compile("|".join(contents))


def _last_end(hard: re.Pattern[str] | None, text: str) -> int:
    """Where the last hard token of the text ends; 0 without one."""
    return max((found.end() for found in hard.finditer(text)), default=0) if hard else 0


def _ids_and_start(front: list[int], encoding: Any, boundary: int, bos: int | None, eos: int) -> tuple[np.ndarray, int, bool]:
    """(ids with BOS and EOS, index of the first answer token, whether that token begins inside the prompt).

    front: ids before the encoding, in whose text the prompt ends at `boundary`.
    """
    ids = encoding.ids
    start = encoding.char_to_token(boundary)
    if start is None:  # a tokenizer that takes blanks out of the offsets: search them
        start = next((i for i, (_, end) in enumerate(encoding.offsets) if end > boundary), len(ids))
    straddled = start < len(ids) and encoding.token_to_chars(start)[0] < boundary
    before = [*([bos] if bos is not None and [*front, *ids][:1] != [bos] else []), *front]
    return np.array([*before, *ids, eos], np.int32), start + len(before), straddled


def _fit(
    sides: list[tuple[np.ndarray, int, bool]], bos: int | None, special: set[int], max_length: int, instructed: bool, whole: bool
) -> tuple[tuple[list[np.ndarray], list[int]] | None, str, list[str]]:
    """(ids and starts cut to `max_length` or None, reason for None, remarks on a kept row)."""
    ids, starts = [side[0] for side in sides], [side[1] for side in sides]
    if any(start == len(tokens) - 1 for tokens, start in zip(ids, starts, strict=True)):
        return None, EMPTY, []
    if min(starts) < 1:
        return None, NO_CONTEXT, []
    remarks = []
    over = max(len(tokens) for tokens in ids) - max_length
    if over > 0:
        front = int(all(tokens[0] == bos for tokens in ids))  # whether the tokenizer or the template put it there
        if instructed or whole or min(starts) - over < front + 1:  # the start of an instructed prompt is the instruction
            return None, TOO_LONG, []
        ids = [np.concatenate([tokens[:front], tokens[front + over :]]) for tokens in ids]
        starts = [start - over for start in starts]
        remarks.append(CUT)
    if any(side[2] for side in sides):
        remarks.append(STRADDLED)
    if instructed:
        if len({tokens[start:].tobytes() for tokens, start in zip(ids, starts, strict=True)}) > 1:
            return None, DEPENDS, []
    elif _common(ids, starts) < max(starts):
        remarks.append(UNEQUAL)
    if not all(special.isdisjoint(tokens[start:-1].tolist()) for tokens, start in zip(ids, starts, strict=True)):
        remarks.append(SPELLED)
    return (ids, starts), "", remarks


def _common(ids: list[np.ndarray], starts: list[int]) -> int:
    """Tokens at the front of the prompts that are the same in all."""
    shortest = min(starts)
    differ = [np.flatnonzero(ids[0][:shortest] != tokens[:shortest]) for tokens in ids[1:]]
    return min((int(places[0]) for places in differ if len(places)), default=shortest)


def make_rows(kept: list[tuple[int, list[np.ndarray], list[int]]]) -> Rows:
    """Rows from (index of the record, ids of each answer behind its prompt, index of each answer's first token)."""
    starts = np.array([row[2] for row in kept], np.int32)
    lengths = np.array([[len(tokens) for tokens in row[1]] for row in kept], np.int32)
    ends = np.cumsum(lengths, dtype=np.int64).reshape(lengths.shape)
    return Rows(
        ids=np.concatenate([tokens for row in kept for tokens in row[1]]),
        offsets=ends - lengths,
        starts=starts,
        lengths=lengths,
        common=np.array([_common(row[1], row[2]) for row in kept], np.int32),
        hashes=np.array([_content_hash(row[1], row[2]) for row in kept]),
        records=np.array([row[0] for row in kept], np.int32),
    )


def _content_hash(ids: list[np.ndarray], starts: list[int]) -> str:
    """Starts and lengths are hashed too: they say where prompts end, which the ids alone do not."""
    digest = hashlib.sha256(np.array([starts, [len(tokens) for tokens in ids]], "<i4").tobytes())
    for tokens in ids:
        digest.update(tokens.astype("<i4").tobytes())
    return digest.hexdigest()[:16]
