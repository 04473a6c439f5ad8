"""A blocking call in a thread of its own: a weight sync computes and asks the server at the same time."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class BackgroundCall(Generic[T]):
    """Runs `call` from now on in a daemon thread; `result` waits for it and raises what it raised.

    As a context manager it waits at the end of the block, unless the block failed: both may meet in one NCCL call, and then
    the other side may never end. The call's own error comes before the block's, which it usually caused.
    """

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._results: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="ludic-server-call")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._results.append(self._call())
        except BaseException as error:  # raised where the result is asked for
            self._error = error

    def result(self, timeout_s: float | None = None) -> T:
        """What the call returned. Raises TimeoutError where it is still running after `timeout_s` seconds."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError
        if self._error is not None:
            raise self._error
        return self._results[0]

    def __enter__(self) -> "BackgroundCall[T]":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._thread.join()
        if self._error is not None:
            raise self._error
