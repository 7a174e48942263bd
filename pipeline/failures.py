"""What to do with samples that cannot be decoded: stop with their names, or replace them within a budget."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from common.errors import UserError
from shards.folder import ShardFolder

POLICIES = ("raise", "skip")

# Samples for which the budget is granted in advance: a few early ones are no verdict on a data set.
PROBATION = 10_000
_MAX_NAMED = 10
_log = logging.getLogger("pipeline")


@dataclass
class FailurePolicy:
    """Counts bad samples and decides whether to go on.

    Attributes:
        mode: `raise` stops at the first bad sample; `skip` puts another row in its place.
        budget: share of the samples read that may be bad under `skip`; of the first `PROBATION` at once.
        reasons: the bad rows met so far and why.
        num_replaced: samples replaced so far; a row counts once for each time it was due.
        num_samples: samples handed out so far.
    """

    mode: str = "raise"
    budget: float = 0.001
    reasons: dict[int, str] = field(default_factory=dict)
    num_replaced: int = 0
    num_samples: int = 0

    def __post_init__(self) -> None:
        if self.mode not in POLICIES:
            raise UserError(f"policy: {self.mode!r} is unknown. There are: {', '.join(POLICIES)}.")
        if not 0 <= self.budget <= 1:
            raise UserError(f"skip budget {self.budget}: it is a share from 0 to 1. Change --skip_budget.")

    def report(self, folder: ShardFolder, reasons: Mapping[int, str]) -> None:
        """Take note of bad rows.

        Raises:
            UserError: the policy is `raise`; the message names every row by shard, row and key.
        """
        named = [f"{folder.describe(row)}: {reason}" for row, reason in reasons.items()]
        if self.mode == "raise":
            more = f"\n  and {len(named) - _MAX_NAMED} more" if len(named) > _MAX_NAMED else ""
            raise UserError(
                f"{len(named)} sample(s) cannot be decoded:\n  "
                + "\n  ".join(named[:_MAX_NAMED])
                + more
                + "\nRun `make verify-shards` and pack the shards again, or go on without them by policy skip."
            )
        for row, reason in reasons.items():
            if row not in self.reasons:
                self.reasons[row] = reason
                _log.warning("%s: %s; another row takes its place", folder.describe(row), reason)

    def count(self, num_samples: int, num_replaced: int) -> None:
        """Count a batch that is handed out.

        Raises:
            UserError: more samples were replaced than the budget allows.
        """
        self.num_samples += num_samples
        self.num_replaced += num_replaced
        allowed = self.budget * max(self.num_samples, PROBATION)
        if self.num_replaced > allowed:
            raise UserError(
                f"{self.num_replaced} of {self.num_samples} samples could not be decoded, the skip budget "
                f"allows {allowed:.1f} ({self.budget:g} of the samples, {PROBATION} granted in advance). "
                "Run `make verify-shards` and pack the shards again, or raise skip_budget."
            )

    def summary(self) -> str:
        """One line for the end of a run."""
        return f"{self.num_replaced} of {self.num_samples} samples replaced, {len(self.reasons)} distinct rows bad"
