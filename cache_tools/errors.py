"""What can be wrong with a cache of teacher outputs; each is a message that a user can act on."""

from __future__ import annotations

from common.errors import UserError

REPAIR = "Run `python -m cache_tools repair` on the cache and build again: only the damaged shards are rebuilt."


class CacheMismatch(UserError):
    """The cache was made from another teacher, seed, codec, augmentation or set of shards."""


class CacheIncomplete(UserError):
    """Some tar shards have no commit record: the build has not finished."""


class CacheStale(UserError):
    """A row no longer belongs to its image: the JPEG or its crops changed after the cache was built."""


class CacheCorrupt(UserError):
    """A file is missing, cut short, altered, or is not the one that was committed."""
