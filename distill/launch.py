"""torchrun, ending with what the rank that failed has to say instead of a traceback of its own.

`python -m distill.launch --nproc-per-node 8 train.py ...` takes torchrun's arguments.
"""

from __future__ import annotations

if __name__ == "__main__":
    from common.interrupt import end_at_interrupt

    end_at_interrupt()

import json
import sys
from pathlib import Path
from signal import SIGTERM, Signals
from typing import Any

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def launch() -> int:
    """Run torchrun; return the exit status of the rank that failed first, 130 if interrupted."""
    try:
        main()
    except ChildFailedError as error:
        print(_last_line(error), file=sys.stderr)
        exitcode: int = error.get_first_failure()[1].exitcode
        return exitcode if exitcode > 0 else 1
    except SignalException:
        return 130
    return 0


def _last_line(error: ChildFailedError) -> str:
    """Return what the rank that failed has to say, not those that it took along: these may have ended before it did."""
    rank, failure = error.get_first_failure()
    files = [file for file in Path(failure.error_file).parent.parent.glob("*/error.json") if file.stat().st_size]
    told = [json.loads(file.read_text()) for file in files]
    first = min(told, key=lambda record: (_taken_along(record), record["timestamp"]), default=None)
    killed = [(one, -it.exitcode) for one, it in error.failures.items() if it.exitcode < 0 and -it.exitcode != SIGTERM]
    if killed and (first is None or _taken_along(first)):
        rank, number = killed[0]
        name = Signals(number).name
        memory = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        return f"error: rank {rank} was ended by {name}{memory}. The same command continues from what is finished."
    return first["message"] if first else f"error: rank {rank} ended with status {failure.exitcode}: see above."


def _taken_along(record: dict[str, Any]) -> bool:
    """Whether a rank only says that another one is gone."""
    return any(mark in record["message"] for mark in ("gloo/transport", "by peer", "NCCL"))


if __name__ == "__main__":
    sys.exit(launch())
