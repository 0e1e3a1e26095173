"""Prepare what is needed next while the caller is busy."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor


def prefetch[T](items: Iterator[T], ahead: int = 1) -> Iterator[T]:
    """Yield the items, computing the next ones in a thread, so many ahead of the caller."""
    pool = ThreadPoolExecutor(1)
    try:
        end = object()
        waiting: deque[Future[T | object]] = deque(
            pool.submit(next, items, end) for _ in range(ahead)
        )
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield item  # type: ignore[misc]
    finally:
        # An iterator that nobody reads to its end is collected at any time, in any thread: one that
        # waited here for another thread could wait for ever.
        pool.shutdown(wait=False, cancel_futures=True)
