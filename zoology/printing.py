"""Printing to a reader that may stop early."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


def exit_code_of(write: Callable[[], object]) -> int:
    """Call `write`, which prints: 0, or 1 where who reads, such as `head`, had what it wanted before the end."""
    try:
        write()
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0
