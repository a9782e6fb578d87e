"""How a command fails: one sentence on stderr, and an exit code a script can rely on.

0 done; 1 bad input, or the work could not be done; 2 bad usage; 130 interrupted (128 + the
signal's number).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn, ParamSpec

import typer

BAD_INPUT = 1
BAD_USAGE = 2
INTERRUPTED = 128 + signal.SIGINT

# Set to see the traceback of an error instead of its sentence.
TRACEBACK_VARIABLE = "FASTAGG_TRACEBACK"

P = ParamSpec("P")


def command(function: Callable[P, None]) -> Callable[P, None]:
    """A command whose errors become a sentence on stderr and an exit code.

    Under `--json` (the parameter `json_output`) stdout carries `{"error": ..}`, so that a program
    reads one document whatever happens.
    """

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            say("interrupted; nothing was written")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            _leave_a_closed_pipe()
        except Exception as error:
            if os.environ.get(TRACEBACK_VARIABLE):
                raise
            fail(error, as_json=bool(kwargs.get("json_output")))

    return guarded


def fail(error: Exception, *, as_json: bool) -> NoReturn:
    """Say what went wrong and leave with `BAD_INPUT`."""
    message = sentence(error)
    say(f"error: {message}")
    if as_json:
        with contextlib.suppress(OSError):  # stdout may be what failed
            print(json.dumps({"error": {"type": type(error).__name__, "message": message}}))
    raise typer.Exit(BAD_INPUT)


def say(message: str) -> None:
    """A line for the person at the terminal: on stderr, so that stdout stays the result's."""
    print(f"fastagg: {message}", file=sys.stderr, flush=True)


def sentence(error: BaseException) -> str:
    """An error in one sentence, with the way out where there is one."""
    from fastagg.errors import FastAggError

    text = " ".join(str(error).split())
    if isinstance(error, FastAggError):
        return text
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    # Of this package's own parts, those that are missing were not built.
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("fastagg"):
        return (
            f"{text}; pip install 'fastagg[federated]' brings what simulations and the demo need, "
            "'fastagg[bench]' what the benchmarks do"
        )
    if isinstance(error, ImportError):
        return f"{text}; `fastagg info` tells what is installed and why a library failed to load"
    return (
        f"unexpected {type(error).__name__}: {text or 'no message'}; "
        f"set {TRACEBACK_VARIABLE}=1 to see where, and report it with the output of `fastagg info`"
    )


def unwind_on_termination() -> None:
    """Let a signal that ends the process unwind its stack as Ctrl-C does, so that half-written
    folders are removed."""

    def leave(number: int, _: Any) -> NoReturn:
        raise SystemExit(128 + number)

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # Under nohup it is ignored, and is to stay so.
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, leave)


def _leave_a_closed_pipe() -> NoReturn:
    # `fastagg inspect .. | head` closes stdout early; the interpreter would complain at its exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise typer.Exit(BAD_INPUT)
