"""The error that a user can act on: bad input, named with its place and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input or a damaged file. The message says what is wrong, where, the value seen and what to do.

    Commands print the message alone, without a traceback, and exit with status 2.
    """


def unknown_name(what: str, name: str, known: Iterable[str]) -> UserError:
    """Return the error for a name that is none of `known`, with the closest of them as a hint."""
    choices = list(known)
    close = difflib.get_close_matches(name, choices, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return UserError(f"{what}: {name!r} is unknown.{hint} There are: {', '.join(choices)}.")
