"""What all commands share: how they end.

Exit codes: 0 success; 2 the user's mistake, said in one sentence; 1 anything else, a fault of ours or an interruption.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from io import TextIOWrapper

from detector.errors import UserError

SUCCESS, OTHER, MISTAKE = 0, 1, 2


def run_command(function: Callable[[], int | None]) -> int:
    """Calls `function` and returns the exit code of the command; None counts as success."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # where the locale knows no ± there is ?, not the end of the command
            stream.reconfigure(errors="replace")
    try:
        return function() or SUCCESS
    except UserError as error:
        _say(f"error: {error}")
        return MISTAKE
    except KeyboardInterrupt:
        _say("interrupted")
        return OTHER
    except BrokenPipeError:  # the reader of our output, such as `head`, has had enough
        sys.stderr.close()
        return OTHER
    except Exception:
        sys.stdout.flush()
        traceback.print_exc()
        return OTHER


def _say(text: str) -> None:
    sys.stdout.flush()  # so that the error comes last also where both streams end in one file
    print(text, file=sys.stderr, flush=True)


class Progress:
    """A bar on a terminal, gone when done."""

    def __enter__(self) -> Progress:
        from rich import progress
        from rich.console import Console

        self.bar = progress.Progress(transient=True, console=Console(stderr=True))
        self.bar.start()
        return self

    def start(self, images: int) -> Callable[[], None]:
        task = self.bar.add_task("images", total=images)
        return lambda: self.bar.advance(task)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
