"""A blocking call in a thread of its own: a weight sync computes and asks the server at the same time."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class BackgroundCall(Future[T]):
    """A future of `call`, which runs from now on in a daemon thread.

    As a context manager it waits at the end of the block, unless the block failed: both may meet in one NCCL call, and then
    the other side may never end. The call's own error comes before the block's, which it usually caused.
    """

    def __init__(self, call: Callable[[], T]) -> None:
        super().__init__()
        threading.Thread(target=self._run, args=(call,), daemon=True, name="ludic-server-call").start()

    def _run(self, call: Callable[[], T]) -> None:
        try:
            self.set_result(call())
        except BaseException as error:  # raised where the result is asked for
            self.set_exception(error)

    def __enter__(self) -> "BackgroundCall[T]":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or self.done():
            self.result()
