"""Prepare what is needed next while the caller is busy."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor


def prefetch[T](items: Iterator[T], ahead: int = 1) -> Iterator[T]:
    """Yield the items, computing the next ones in a thread, so many ahead of the caller."""
    with ThreadPoolExecutor(1) as pool:
        end = object()
        waiting: deque[Future[T | object]] = deque(
            pool.submit(next, items, end) for _ in range(ahead)
        )
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield item  # type: ignore[misc]
