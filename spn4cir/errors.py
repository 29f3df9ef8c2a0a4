"""The one error that is meant for people."""

import os
import sys
from collections.abc import Callable


class InputError(ValueError):
    """Something a person can mend: the message names the file or the value, and what to do, in one line."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command; an ``InputError`` becomes one line on stderr and exit code 2, an interrupt exit code 130."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # whoever read the output has closed it, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
