"""A generator made of something that calls back; it knows nothing of what it hands over."""

import atexit
import queue
import threading
from collections.abc import Callable, Generator


class Closed(Exception):
    """Raised in the thread of `as_generator` when nobody wants more items."""


def as_generator(run: Callable[[Callable, threading.Event], None]) -> Generator:
    """A generator of the items that run(hand_over, closed) hands over as it goes.

    SciPy calls us, and whoever iterates wants to call us too: a thread serves both. Only one of
    the two ever runs: run() waits in hand_over() until the next item is asked for. After the
    generator is closed, `closed` is set and hand_over() raises Closed.
    """
    items: queue.SimpleQueue = queue.SimpleQueue()
    asked, closed = threading.Semaphore(0), threading.Event()
    end, failure = object(), []

    def hand_over(item: object) -> None:
        items.put(item)
        asked.acquire()
        if closed.is_set():
            raise Closed

    def work() -> None:
        try:
            run(hand_over, closed)
        except Closed:
            pass
        except BaseException as error:  # it belongs to whoever iterates, not to this thread
            failure.append(error)
        items.put(end)

    # Python waits for other threads before it ends, and for this one in vain if the generator was left as it is.
    thread = threading.Thread(target=work, name="deepstyle-optimiser", daemon=True)

    def close() -> None:
        closed.set()
        asked.release()
        thread.join()

    atexit.register(close)
    thread.start()
    try:
        while (item := items.get()) is not end:
            yield item
            asked.release()
    finally:
        atexit.unregister(close)
        close()
    if failure:
        raise failure[0]
