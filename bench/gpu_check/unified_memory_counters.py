"""Bytes that unified memory moved, as CUPTI counts them.

CUPTI's unified-memory counters report every transfer that the driver makes for managed memory, with
its direction: https://docs.nvidia.com/cupti/ (Activity API, unified memory counters).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_KIND_UNIFIED_MEMORY_COUNTER = 25
_SCOPE_PROCESS_SINGLE_DEVICE = 1
_HOST_TO_DEVICE = 1
_DEVICE_TO_HOST = 2
_FLUSH_FORCED = 1
_BUFFER_BYTES = 8 << 20

_REQUESTED = ctypes.CFUNCTYPE(
    None,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.POINTER(ctypes.c_size_t),
    ctypes.POINTER(ctypes.c_size_t),
)
_COMPLETED = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t
)


class _Config(ctypes.Structure):
    _fields_ = (
        ("scope", ctypes.c_int),
        ("kind", ctypes.c_int),
        ("device", ctypes.c_uint32),
        ("enable", ctypes.c_uint32),
    )


class _Record(ctypes.Structure):  # the head that all versions of the record share
    _fields_ = (
        ("kind", ctypes.c_uint32),
        ("counter", ctypes.c_uint32),
        ("value", ctypes.c_uint64),
    )


@dataclass
class Transfers:
    """Bytes moved while counting."""

    host_to_device: int = 0
    device_to_host: int = 0
    unavailable: str = ""


class Counters:
    """The counters of one GPU, switched on once for the process."""

    def __init__(self, ordinal: int = 0) -> None:
        self._current = Transfers()
        self._buffers: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self.unavailable = ""
        try:
            self._cupti = self._load()
            self._callbacks = (_REQUESTED(self._request), _COMPLETED(self._complete))
            configs = (_Config * 2)(
                *(
                    _Config(_SCOPE_PROCESS_SINGLE_DEVICE, kind, ordinal, 1)
                    for kind in (_HOST_TO_DEVICE, _DEVICE_TO_HOST)
                )
            )
            self._call("cuptiActivityRegisterCallbacks", *self._callbacks)
            self._call("cuptiActivityConfigureUnifiedMemoryCounter", configs, 2)
            self._call("cuptiActivityEnable", _KIND_UNIFIED_MEMORY_COUNTER)
        except OSError as error:
            self.unavailable = str(error)

    @contextmanager
    def counting(self) -> Iterator[Transfers]:
        """Count what moves while the block runs; the caller synchronizes the device inside it."""
        if self.unavailable:
            yield Transfers(unavailable=self.unavailable)
            return
        self._call("cuptiActivityFlushAll", _FLUSH_FORCED)
        self._current = Transfers()
        yield self._current
        self._call("cuptiActivityFlushAll", _FLUSH_FORCED)
        self._current = Transfers()

    @staticmethod
    def _load() -> ctypes.CDLL:
        for name in ("libcupti.so.13", "libcupti.so.12", "libcupti.so"):
            try:
                return ctypes.CDLL(name)
            except OSError:
                continue
        raise OSError("libcupti was not found")

    def _call(self, name: str, *args: object) -> None:
        code = getattr(self._cupti, name)(*args)
        if code != 0:
            raise OSError(f"{name} returned {code}")

    def _request(self, buffer: object, size: object, records: object) -> None:
        memory = ctypes.create_string_buffer(_BUFFER_BYTES)
        address = ctypes.addressof(memory)
        self._buffers[address] = memory
        buffer[0], size[0], records[0] = address, _BUFFER_BYTES, 0  # type: ignore[index]

    def _complete(self, context: int, stream: int, buffer: int, size: int, valid: int) -> None:
        record = ctypes.c_void_p(None)
        advance = self._cupti.cuptiActivityGetNextRecord
        while (
            valid
            and advance(ctypes.c_void_p(buffer), ctypes.c_size_t(valid), ctypes.byref(record)) == 0
        ):
            head = ctypes.cast(record, ctypes.POINTER(_Record)).contents
            if head.kind == _KIND_UNIFIED_MEMORY_COUNTER:
                if head.counter == _HOST_TO_DEVICE:
                    self._current.host_to_device += head.value
                elif head.counter == _DEVICE_TO_HOST:
                    self._current.device_to_host += head.value
        self._buffers.pop(buffer, None)
