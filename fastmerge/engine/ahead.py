"""Reading ahead: an iterator that works in a thread of its own, a little before what it makes is asked for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

DEPTH = 1
"""Made things that wait. Together with the one in use and the one being made, that many share memory in a ring."""
IN_FLIGHT = DEPTH + 2


@contextmanager
def ahead(items: Iterable[T]) -> Iterator[Iterator[T]]:
    """The same items, made in a thread; an error there is raised here, and leaving early ends the thread."""
    made: queue.Queue[Any] = queue.Queue(DEPTH)
    stopped = threading.Event()
    end = object()

    def put(thing: Any) -> bool:
        while not stopped.is_set():
            try:
                made.put(thing, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((end, None))
        except BaseException as error:
            put((end, error))

    def taken() -> Iterator[T]:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item

    thread = threading.Thread(target=work, name="fastmerge-read", daemon=True)
    thread.start()
    try:
        yield taken()
    finally:
        stopped.set()
        thread.join()
