"""Memory of one GPU that two processes see: allocated and exported by one, mapped by the other.

The CUDA driver's own calls, by ctypes. torch's sharing of a tensor would export the whole segment of its allocator that the
tensor lies in, needs pickle on the wire and a reference counter in shared memory, which a killed trainer leaves behind, and
breaks with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True. What is allocated here belongs to no allocator of torch's.
"""

import contextlib
import ctypes
import functools
import sys
from collections.abc import Iterator
from typing import Any

import torch

_HANDLE_BYTES = 64
_LAZY_ENABLE_PEER_ACCESS = 1
"""The driver knows this flag alone, and requires it."""


class NoIpcError(RuntimeError):
    """The driver does not share memory between these processes; one line."""


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_byte * _HANDLE_BYTES),)


def exported_buffer(num_bytes: int, device: torch.device) -> tuple[torch.Tensor, str]:
    """A new buffer ([num_bytes] uint8) on `device` and the handle, in hex, by which another process maps it.

    It is freed with the last tensor that lies in it. Nobody may have it mapped then.

    Raises:
        NoIpcError: there is no driver, no room, or memory cannot be exported.
    """
    memory = _Exported(num_bytes, device)
    return _tensor(memory, memory.pointer, device), memory.export()


@contextlib.contextmanager
def mapped_buffer(handle: str, num_bytes: int, device: torch.device) -> Iterator[torch.Tensor]:
    """For the length of the block, the buffer ([num_bytes] uint8) that another process on the same GPU has exported.

    Mapped only as long as it is used, so that nothing of a trainer that dies between two syncs stays allocated.

    Raises:
        NoIpcError: the driver does not map it.
    """
    pointer = ctypes.c_uint64()
    opened = _Handle.from_buffer_copy(bytes.fromhex(handle))
    with _current(device):
        _call("cuIpcOpenMemHandle_v2", ctypes.byref(pointer), opened, _LAZY_ENABLE_PEER_ACCESS)
        try:
            yield _tensor(_Array(int(pointer.value), num_bytes), int(pointer.value), device)
        finally:
            torch.cuda.synchronize(device)  # whatever reads it must be over
            _call("cuIpcCloseMemHandle", pointer)


class _Array:
    """Memory as torch takes it without a copy."""

    def __init__(self, pointer: int, num_bytes: int) -> None:
        self.pointer = pointer
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 2,
        }


class _Exported(_Array):
    """Memory of its own, which a tensor on it keeps alive."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._device = device
        pointer = ctypes.c_uint64()
        with _current(device):
            try:
                _call("cuMemAlloc_v2", ctypes.byref(pointer), num_bytes)
            except NoIpcError:  # torch may sit on memory that it does not use
                torch.cuda.empty_cache()
                _call("cuMemAlloc_v2", ctypes.byref(pointer), num_bytes)
        super().__init__(int(pointer.value), num_bytes)

    def export(self) -> str:
        handle = _Handle()
        with _current(self._device):
            _call("cuIpcGetMemHandle", ctypes.byref(handle), self.pointer)
        return bytes(handle).hex()

    def __del__(self) -> None:
        pointer = getattr(self, "pointer", 0)  # 0: there was no room
        if pointer and not sys.is_finalizing():  # the process takes the rest with it
            with _current(self._device):
                _call("cuMemFree_v2", pointer)


def _tensor(memory: _Array, pointer: int, device: torch.device) -> torch.Tensor:
    tensor = torch.as_tensor(memory, device=device)
    if tensor.data_ptr() != pointer:
        raise NoIpcError("torch copied the memory that it should have taken as it is")
    return tensor


@contextlib.contextmanager
def _current(device: torch.device) -> Iterator[None]:
    """Make `device`'s context the driver's current one in this thread. What the device was given before is over then."""
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # a thread that has not called CUDA yet has no context, whatever its device is
        yield


@functools.cache
def _driver() -> Any:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise NoIpcError("there is no CUDA driver here (libcuda.so.1)") from error
    pointer = ctypes.POINTER(ctypes.c_uint64)
    driver.cuMemAlloc_v2.argtypes = (pointer, ctypes.c_size_t)
    driver.cuMemFree_v2.argtypes = (ctypes.c_uint64,)
    driver.cuIpcGetMemHandle.argtypes = (ctypes.POINTER(_Handle), ctypes.c_uint64)
    driver.cuIpcOpenMemHandle_v2.argtypes = (pointer, _Handle, ctypes.c_uint)
    driver.cuIpcCloseMemHandle.argtypes = (ctypes.c_uint64,)
    driver.cuGetErrorName.argtypes = (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p))
    return driver


def _call(name: str, *args: object) -> None:
    """Call the driver. Raises NoIpcError with its name for what went wrong."""
    driver = _driver()
    code = getattr(driver, name)(*args)
    if code:
        text = ctypes.c_char_p()
        driver.cuGetErrorName(code, ctypes.byref(text))
        raise NoIpcError(f"{name} gave {(text.value or b'an unknown error').decode()} ({code})")
