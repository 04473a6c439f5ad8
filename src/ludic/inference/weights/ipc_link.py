"""Both ends of a weight sync between two processes on one GPU: buckets in shared memory of the GPU, and whose turn it is.

The trainer packs a bucket into one half of a buffer (`ipc_memory`) while the worker copies the other half into its model. They
take turns by a byte over a Unix socket: a process that ends closes it, so the other side never waits for the dead. The
worker connects and maps for one round only, and keeps nothing in between. It needs torch and nothing of vLLM.
"""

import contextlib
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from ludic.inference.weights.bucket_broadcast import WireLayout
from ludic.inference.weights.bucket_layout import pack, unpack
from ludic.inference.weights.digest import FlatDigest
from ludic.inference.weights.ipc_memory import exported_buffer

BUCKET_BYTES = 256 << 20
"""Two such halves, on the trainer's side alone. A model of 1 GB takes 4 turns, and each turn costs a switch of the GPU between
the two processes."""
TOKEN_BYTES = 16
ACCEPT_POLL_S = 0.05
_TURN = b"."


class LinkBrokenError(RuntimeError):
    """The other side has gone, did not come, or took too long; one line."""


class Doorbell:
    """One end of a connection on which either side says that it is the other's turn."""

    def __init__(self, connection: socket.socket, *, deadline_s: float) -> None:
        connection.settimeout(deadline_s)
        self._connection = connection

    def ring(self) -> None:
        with _in_words():
            self._connection.sendall(_TURN)

    def wait(self) -> None:
        with _in_words():
            if not self._connection.recv(1):
                raise LinkBrokenError("the other side of the weight transfer has gone")


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise LinkBrokenError("the other side of the weight transfer did not answer in time") from error
    except OSError as error:
        raise LinkBrokenError(f"the weight transfer was broken off ({error.strerror or error})") from error


def halves(buffer: torch.Tensor, layout: WireLayout) -> list[torch.Tensor]:
    """The parts of the buffer that take turns, each of `layout.buffer_bytes`: two, or one for a single bucket."""
    return list(buffer.split(layout.buffer_bytes))


class IpcLink:
    """The trainer's end. `leave` is for any thread, the rest for one.

    Args:
        path: of the socket; its folder decides who may connect.

    Raises:
        NoIpcError: the GPU's driver does not share memory.
        OSError: there can be no socket at `path`.
    """

    def __init__(self, layout: WireLayout, device: torch.device, path: Path, *, deadline_s: float) -> None:
        self.layout = layout
        self.path = path
        self._device = device
        self._deadline_s = deadline_s
        self._sockets: list[socket.socket] = []
        self._left = False
        buffer, self.handle = exported_buffer(min(2, max(1, len(layout.buckets))) * layout.buffer_bytes, device)
        self._halves = halves(buffer, layout)
        self.num_bytes = buffer.nbytes
        self._listener = socket.socket(socket.AF_UNIX)
        self._sockets.append(self._listener)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(ACCEPT_POLL_S)

    def mark(self) -> str:
        """Write a random token to the buffer's beginning; in hex. Who maps the same memory finds it there."""
        token = secrets.token_bytes(TOKEN_BYTES)
        self._halves[0][:TOKEN_BYTES] = torch.tensor(list(token), dtype=torch.uint8)
        finish(self._device)
        return token.hex()

    def send(self, tensors: Sequence[torch.Tensor], *, ended: Callable[[], bool]) -> list[int]:
        """One round of `tensors` (of the layout's shapes, contiguous), cast to its dtype; their digests as they went out.

        Args:
            ended: whether the worker will not come any more.

        Raises:
            LinkBrokenError: the worker did not take all of them.
        """
        layout = self.layout
        digest = FlatDigest(len(layout.names), self._device)
        with self._accepted(ended) as connection:
            bell = Doorbell(connection, deadline_s=self._deadline_s)
            for index, bucket in enumerate(layout.buckets):
                half = self._halves[index % 2]
                if index >= 2:
                    bell.wait()  # until the worker has emptied this half
                pack(bucket, tensors, half, layout.dtype)
                finish(self._device)  # the worker's stream knows nothing of ours
                bell.ring()
                digest.add(bucket, half)
            for _ in layout.buckets[-2:]:
                bell.wait()
        return digest.values([(layout.dtype, shape) for shape in layout.shapes])

    @contextlib.contextmanager
    def _accepted(self, ended: Callable[[], bool]) -> Iterator[socket.socket]:
        deadline = time.monotonic() + self._deadline_s
        while True:
            # Once more after the worker's call has ended: it may have come and gone.
            last = ended() or time.monotonic() > deadline
            try:
                connection, _ = self._listener.accept()
                break
            except TimeoutError:
                if last:
                    raise LinkBrokenError("the server did not come for the weights") from None
            except OSError as error:
                raise LinkBrokenError("the weight transfer was given up") from error
        self._sockets.append(connection)
        try:
            if self._left:  # it came too late to be shut down
                raise LinkBrokenError("the weight transfer was given up")
            yield connection
        finally:
            self._sockets.remove(connection)
            connection.close()

    def leave(self) -> None:
        """End a round that is under way. The buffer is freed when the thread that is in it has left it."""
        self._left = True
        for one in list(self._sockets):
            with contextlib.suppress(OSError):  # not connected, or gone
                one.shutdown(socket.SHUT_RDWR)  # wakes who waits; closing alone would not
        self._listener.close()


def receive_buckets(
    layout: WireLayout,
    buffer: torch.Tensor,
    path: str,
    targets: Sequence[torch.Tensor],
    *,
    deadline_s: float,
) -> None:
    """The worker's end of one round: copy it from the mapped `buffer` into `targets`, in place and in the layout's order.

    Raises:
        LinkBrokenError: the trainer stopped in the middle; what was copied until then stays.
    """
    parts, device = halves(buffer, layout), buffer.device
    with socket.socket(socket.AF_UNIX) as connection:
        with _in_words():
            connection.connect(path)
        bell = Doorbell(connection, deadline_s=deadline_s)
        for index, bucket in enumerate(layout.buckets):
            bell.wait()
            unpack(bucket, parts[index % 2], targets)
            finish(device)
            bell.ring()


def finish(device: torch.device) -> None:
    """Wait for what this thread's stream was given."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
