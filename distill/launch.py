"""torchrun, ending with what the rank that failed has to say instead of a traceback of its own.

`python -m distill.launch --nproc-per-node 8 train.py ...` takes torchrun's arguments.
"""

from __future__ import annotations

if __name__ == "__main__":
    from common.interrupt import end_at_interrupt

    end_at_interrupt()

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def launch() -> int:
    """Run torchrun; return the exit status of the rank that failed first, 130 if interrupted."""
    try:
        main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        told = failure.error_file_data.get("message") if failure.error_file_data else None
        print(told or f"error: rank {rank} failed: {failure.message}. Its own output is above.", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 1
    except SignalException:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(launch())
