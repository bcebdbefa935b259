"""The one exception a user of meetjax is meant to read."""

from __future__ import annotations

_UNSAID = object()


class MeetjaxError(ValueError):
    """A mistake in the input, told in one line: what and where, what was expected, what was found, what to do.

    The command line prints it without a traceback and exits with status 2.
    """

    def __init__(self, what: str, *, expected: object = _UNSAID, found: object = _UNSAID, fix: str | None = None):
        parts = [what]
        if expected is not _UNSAID:
            parts.append(f"expected {expected}")
        if found is not _UNSAID:
            parts.append(f"found {found}")
        if fix is not None:
            parts.append(fix)
        super().__init__("; ".join(" ".join(str(p).split()) for p in parts))
