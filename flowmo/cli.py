"""What all commands share: errors of one paragraph, a traceback on request."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable

# Errors whose message is written for the user. Anything else is a bug and keeps its traceback.
EXPECTED = (ValueError, TypeError, OSError, RuntimeError, FloatingPointError)


def run(command: Callable[[list[str]], int | None]) -> None:
    """Run a command with the arguments of the process and exit with its code; `--debug` keeps tracebacks."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.captureWarnings(True)
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        code = command([a for a in arguments if a != "--debug"])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except EXPECTED as error:
        if debug:
            traceback.print_exc()
        else:
            print(f"error: {error}\n(--debug shows where)", file=sys.stderr)
        sys.exit(1)
    sys.exit(code or 0)
