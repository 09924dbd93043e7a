"""How a command is run: what it imports, how it ends, and with which exit code."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from types import FrameType

from fastmerge.errors import FastmergeError, MergeError

DONE, FAILED, WRONG = 0, 1, 2
"""Exit codes: done; the merge failed; the command line, the config or a checkpoint's header is wrong."""

DEBUG_VARIABLE = "FASTMERGE_DEBUG"


def quieten_other_threads() -> None:
    """A merge needs no BLAS, and the threads of others that wait for work in a loop take the kernels' cores."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@contextlib.contextmanager
def import_quietly() -> Iterator[None]:
    """Importing torch for a command that computes with the kernels alone."""
    quieten_other_threads()
    with without_garbage_collection():
        yield


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Importing torch makes a million objects and no garbage: looking for some among them takes 60 ms."""
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


class Ended(Exception):  # noqa: N818 - it carries an exit code out of typer and is no error
    """The command has ended and has said why."""

    def __init__(self, code: int) -> None:
        self.code = code


class _Signalled(KeyboardInterrupt):
    """A signal asked the process to end: Ctrl-C, or SIGTERM, which goes the same way."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Within it, SIGINT and SIGTERM raise KeyboardInterrupt."""

    def raise_signal(number: int, frame: FrameType | None) -> None:
        raise _Signalled(number)

    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        # A signal that the caller has ignored (`nohup`, a job in the background) stays ignored.
        if signal.getsignal(number) != signal.SIG_IGN:
            previous[number] = signal.signal(number, raise_signal)
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


def guarded(work: Callable[[], None], as_json: bool) -> int:
    """Run a command's work and turn what goes wrong into one line and an exit code."""
    try:
        work()
    except KeyboardInterrupt as interrupt:
        # Caught here because typer would turn it into a bare exit code.
        raise Ended(interrupted(interrupt, as_json)) from None
    except BrokenPipeError:
        raise
    except FastmergeError as error:
        return complain(str(error), FAILED if isinstance(error, MergeError) else WRONG, as_json)
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        return complain(f"{error.strerror or error}{where and ':'}{where}", FAILED, as_json)
    except MemoryError:
        return complain("Memory ran out: choose a smaller --memory-budget.", FAILED, as_json)
    except Exception as error:
        traceback.print_exc()
        return complain(f"Internal error ({type(error).__name__}): {error}", FAILED, as_json, shown=True)
    return DONE


def complain(message: str, code: int, as_json: bool, *, shown: bool = False) -> int:
    """Say in one line what is wrong, leave nothing unfinished, and give the exit code back."""
    _remove_unfinished()
    if not shown and sys.exc_info()[0] is not None and os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
        traceback.print_exc()
    line = " ".join(message.split())
    if as_json:
        print(json.dumps({"error": line, "exit_code": code}))
    print(f"fastmerge: {line}", file=sys.stderr)
    return code


def interrupted(interrupt: KeyboardInterrupt, as_json: bool) -> int:
    """Say that a signal ended the command; the exit code is 128 and its number."""
    while True:
        # A second Ctrl-C may come at any moment until both signals are ignored.
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            break
        except KeyboardInterrupt:
            continue
    number = _signal_number(interrupt)
    reason = "Interrupted" if number == signal.SIGINT else "Terminated"
    left = getattr(interrupt, "left", "nothing was left behind")
    return complain(f"{reason}; {left}.", 128 + number, as_json)


def _signal_number(interrupt: BaseException) -> int:
    # The merge may raise a KeyboardInterrupt of its own on the way; the one that started it all is in its context.
    link: BaseException | None = interrupt
    while link is not None:
        if isinstance(link, _Signalled):
            return link.number
        link = link.__context__
    return int(signal.SIGINT)


def _remove_unfinished() -> None:
    # The merge removes its own output when it fails. An interrupt can come between any two instructions, though, and so
    # in the middle of that, too.
    atomic = sys.modules.get("fastmerge.engine.atomic")
    if atomic is not None:
        atomic.abort_all()
