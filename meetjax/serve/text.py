"""From tokens to text as it becomes certain: whole characters only, and no part of a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from meetjax.types import Tokenizer

BROKEN = "\ufffd"
"""What a decoder writes for bytes that are no character, or not yet."""


class Writer:
    """The text of one answer. Tokens go in, what is certain comes out."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._begin = self._read = 0
        """Of `_ids`: where decoding starts again, and up to where its text is known. A token's text may depend on the one before."""
        self._held = ""
        """Text that may yet turn out to be the beginning of a stop text."""

    def add(self, token: int) -> tuple[str, bool]:
        """(text that became certain, whether a stop text was met; then it is the last)."""
        self._ids.append(token)
        known, text = self._decode(self._begin, self._read), self._decode(self._begin, len(self._ids))
        if text.endswith(BROKEN) or len(text) < len(known):
            return "", False
        self._begin, self._read = self._read, len(self._ids)
        return self._release(text[len(known) :], last=False)

    def end(self) -> tuple[str, bool]:
        """The same for the end of the answer: what was held back, broken characters included."""
        known, text = self._decode(self._begin, self._read), self._decode(self._begin, len(self._ids))
        self._begin = self._read = len(self._ids)
        return self._release(text[len(known) :], last=True)

    def _decode(self, begin: int, end: int) -> str:
        return self.tokenizer.decode(self._ids[begin:end], skip_special_tokens=False) if end > begin else ""

    def _release(self, fresh: str, last: bool) -> tuple[str, bool]:
        text = self._held + fresh
        found = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = (
            0
            if last
            else max((n for stop in self.stop for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])), default=0)
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False
