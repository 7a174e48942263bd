"""What every command does around its work: errors as one line, exit statuses."""

from __future__ import annotations

import sys
from collections.abc import Callable

from common.errors import UserError


def run_command(work: Callable[[], object]) -> int:
    """Do a command's work and return its exit status: an int that it returns, else 0; 2 for bad input, 130 if
    interrupted."""
    try:
        result = work()
        return result if isinstance(result, int) else 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        # An error that names a file is of the user's files; one that does not may be our own fault.
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}. Check the path and its permissions.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. What is finished is kept; the same command continues from here.", file=sys.stderr)
        return 130
