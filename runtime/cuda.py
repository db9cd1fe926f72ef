"""Device memory, streams and copies of an NVIDIA GPU through cuda.core: what every GPU engine shares.

Nothing here allocates per segment. Work is enqueued on streams of our own, never on the default one.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np

from rmt_trt.errors import EngineError, RMTError, TokenError, require

CUDA_DEVICE, CUDA_MANAGED = 2, 13  # DLDeviceType of the DLPack header
ALIGNMENT = 256
SCRATCH_BYTES = 64 << 20  # what is kept of page-locked memory; an answer that is larger gets its own
# ONNX Runtime captures graphs in CUDA's global mode, in which an allocation or a release in any thread of the process spoils
# a capture: ours wait for it. Those of other libraries cannot be made to.
CAPTURING = threading.RLock()


def library() -> Any:
    """The module cuda.core. Errors: EngineError, naming what to install."""
    return require("cuda.core", "gpu", "an NVIDIA GPU")


@contextmanager
def made_current(device: Any) -> Iterator[None]:
    """Makes a device current in this thread while it is open: the caller's own choice of one stays."""
    import cuda.bindings.driver as driver

    _, before = driver.cuCtxGetCurrent()
    device.set_current()
    try:
        yield
    finally:
        if before is not None and int(before):  # 0 where this thread had none
            driver.cuCtxSetCurrent(before)


def refusal(index: int) -> str | None:
    """Why GPU `index` cannot be used on this machine, or None. Allocates nothing."""
    try:
        core = library()
        devices = core.Device.get_all_devices()
    except EngineError as err:
        return str(err)
    except Exception as err:  # the driver's own errors share no base class across versions
        return f"there is no usable CUDA driver ({one_line(err)}). Install or update the NVIDIA driver, see nvidia-smi"
    if not devices:
        return "the CUDA driver sees no GPU. Check nvidia-smi and CUDA_VISIBLE_DEVICES"
    if not 0 <= index < len(devices):
        return f"device {index} was asked for; the CUDA driver sees {len(devices)}, numbered from 0"
    return None


def on_gpu(array: Any) -> bool:
    """Whether something that speaks DLPack lies in a GPU's memory."""
    return hasattr(array, "__dlpack_device__") and int(array.__dlpack_device__()[0]) in (CUDA_DEVICE, CUDA_MANAGED)


def to_host(array: Any) -> np.ndarray:
    """A host copy of an array of tokens that lies on a GPU and speaks DLPack, made by one transfer.

    Errors: TokenError where that GPU cannot be used from here, and for an array whose values do not lie one behind another.
    """
    index = int(array.__dlpack_device__()[1])
    reason = refusal(index)
    if reason is not None:
        raise TokenError(
            f"tokens of type {type(array).__name__} lie on GPU {index}, and cannot be fetched from there: {reason}. Or move "
            f"them to the host yourself"
        )
    gpu = library().Device(index)
    with made_current(gpu), CAPTURING:
        return _fetched(array, gpu.create_stream())


def _fetched(array: Any, stream: Any) -> np.ndarray:
    from cuda.core.utils import StridedMemoryView

    core = library()

    view = StridedMemoryView.from_dlpack(array, stream_ptr=int(stream.handle))
    wanted = [math.prod(view.shape[axis + 1 :]) for axis in range(len(view.shape))]
    if view.strides is not None and view.size and list(view.strides) != wanted:
        raise TokenError(
            f"tokens of shape {tuple(view.shape)} on the GPU have strides {tuple(view.strides)}; expected their values one "
            f"behind another. Pass a contiguous copy: tokens.contiguous() in PyTorch"
        )
    dtype = np.dtype(view.dtype)
    if not view.size:
        return np.empty(view.shape, dtype)
    nbytes = view.size * dtype.itemsize
    pinned = core.LegacyPinnedMemoryResource().allocate(nbytes)
    core.Buffer.from_handle(view.ptr, nbytes, owner=view).copy_to(pinned, stream=stream)
    stream.sync()
    fetched: np.ndarray = np.from_dlpack(pinned).view(dtype).reshape(view.shape).copy()
    return fetched


class Lent:
    """Keeps memory until nobody uses it, and then puts it aside instead of freeing it.

    The last to let go of it may be any thread at any time, and a free is work on a stream: in the middle of a capture
    on that stream it would spoil the capture.
    """

    def __init__(self, buffer: Any, aside: list[Any]) -> None:
        self._buffer, self._aside = buffer, aside

    def __del__(self) -> None:
        self._aside.append(self._buffer)


class Gpu:
    """One GPU: a stream for work, one for staging, and the memory that is asked for.

    Memory that nobody uses any more is freed when the device is next made current. Errors of every method: EngineError,
    with the driver's own words, when the device cannot be used, has no memory left, or failed in work that was enqueued
    before.
    """

    def __init__(self, index: int) -> None:
        reason = refusal(index)
        if reason is not None:
            raise EngineError(reason)
        self._core = library()
        self.index = index
        self._aside: list[Any] = []
        self.device = self._core.Device(index)
        with saying(f"device {index} cannot be used. Check nvidia-smi"), self.current():
            self.stream = self.device.create_stream()
            self.copies = self.device.create_stream()
            self._pinned = self._core.LegacyPinnedMemoryResource()
            self._scratch: tuple[Any, np.ndarray] = self.pinned((1 << 16,), np.uint8)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Makes the device current in this thread while it is open, and frees what was put aside."""
        with ExitStack() as stack:
            with self._working():
                stack.enter_context(made_current(self.device))
                self._aside.clear()
            yield

    def event(self) -> Any:
        with self._working():
            return self.device.create_event()

    def allocate(self, nbytes: int) -> Any:
        """A buffer of device memory aligned to 256 bytes, its values undefined; it is freed behind the work on `stream`
        that uses it."""
        with saying(
            f"device {self.index} gave no {nbytes} bytes of memory. Step fewer documents together (max_batch, slots), or "
            f"end what else uses this GPU"
        ):
            buffer = self.device.memory_resource.allocate(nbytes, stream=self.stream)
        if int(buffer.handle) % ALIGNMENT:
            raise EngineError(
                f"device {self.index} gave memory at {int(buffer.handle):#x}, not aligned to {ALIGNMENT} bytes"
            )
        return self._core.Buffer.from_handle(int(buffer.handle), nbytes, owner=Lent(buffer, self._aside))

    def zeros(self, nbytes: int) -> Any:
        """The same, filled with zeros."""
        buffer = self.allocate(nbytes)
        buffer.fill(0, stream=self.stream)
        return buffer

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> tuple[Any, np.ndarray]:
        """(buffer, view) of page-locked host memory: an array that the GPU copies from and to by itself."""
        dtype = np.dtype(dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        short = f"the driver gave no {nbytes} bytes of page-locked host memory"
        with CAPTURING, saying(f"{short}. Step fewer documents together (max_batch, slots)"):
            buffer = self._pinned.allocate(nbytes)
        return buffer, np.from_dlpack(buffer).view(dtype).reshape(shape)

    def to_device(self, values: list[np.ndarray]) -> list[Any]:
        """Each array in a buffer of its own; waits until it is there."""
        self.wait()  # what was broken off may still be on its way into the scratch memory
        made = [self.allocate(value.nbytes) for value in values]
        pinned, places = self._places(values)
        for value, buffer, (start, view) in zip(values, made, places, strict=True):
            view[...] = value.reshape(-1).view(np.uint8)
            self.copy(pinned, buffer, value.nbytes, start)
        self.wait()
        return made

    def to_host(self, wanted: list[tuple[Any, tuple[int, ...], Any]]) -> list[np.ndarray]:
        """Host arrays of (buffer, shape, dtype), which the caller owns; one wait for all."""
        found = [np.empty(shape, dtype) for _, shape, dtype in wanted]
        pinned, places = self._places(found)
        for (buffer, _, _), value, (start, _) in zip(wanted, found, places, strict=True):
            self.copy(buffer, pinned, value.nbytes, 0, start)
        self.wait()
        for value, (_, view) in zip(found, places, strict=True):
            value.reshape(-1).view(np.uint8)[...] = view
        return found

    def _places(self, arrays: list[np.ndarray]) -> tuple[Any, list[tuple[int, np.ndarray]]]:
        """Page-locked memory, and (start, bytes) of each array in it. It is kept for the next call up to some size: to lock
        pages takes longer than to copy them."""
        sizes = [-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays]
        scratch = self._scratch
        if sum(sizes) > len(scratch[1]):
            scratch = self.pinned((1 << (sum(sizes) - 1).bit_length(),), np.uint8)
            if len(scratch[1]) <= SCRATCH_BYTES:
                self._scratch = scratch
        starts = [sum(sizes[:number]) for number in range(len(sizes))]
        return scratch[0], [
            (start, scratch[1][start : start + a.nbytes]) for start, a in zip(starts, arrays, strict=True)
        ]

    def part(self, buffer: Any, start: int, nbytes: int) -> Any:
        """Some bytes of a buffer, which stays alive with them."""
        return self._core.Buffer.from_handle(int(buffer.handle) + start, nbytes, owner=buffer)

    def copy(self, source: Any, target: Any, nbytes: int | None = None, start: int = 0, to: int = 0) -> None:
        """Enqueues a copy of bytes on `stream`: all of a buffer, or some from `start` on to the place `to`."""
        with self._working():
            if nbytes is None:
                source.copy_to(target, stream=self.stream)
            elif nbytes:
                self.part(source, start, nbytes).copy_to(self.part(target, to, nbytes), stream=self.stream)

    def wait(self) -> None:
        """Waits until all that was enqueued on `stream` is done."""
        with self._working():
            self.stream.sync()

    def captured(self, work: Callable[[], None]) -> Any:
        """What `work` enqueues on `stream`, as a graph that `launch(stream)` replays; nothing of it is done now.

        The graph holds addresses and keeps no memory alive. Whatever `work` raises, the capture has ended when it comes
        out.
        """
        with saying(f"device {self.index} captured no CUDA graph"):
            builder = self.stream.create_graph_builder()
            try:
                # Of this thread alone: an allocation in another one does not spoil it.
                builder.begin_building(mode="thread_local")
                work()
                builder.end_building()
                graph = builder.complete()
            except BaseException:
                # It ends the capture, and complains of one that is spoiled; what went wrong inside says more than that.
                with suppress(Exception):
                    builder.close()
                raise
            builder.close()
            return graph

    def array(self, buffer: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        """A buffer as an array that speaks DLPack, without a copy. Its work is waited for first."""
        from cuda.core.utils import StridedMemoryView

        self.wait()
        return StridedMemoryView.from_buffer(buffer, shape, dtype=np.dtype(dtype))

    def close(self) -> None:
        """Waits for what is under way and lets go of it all, also where that failed."""
        try:
            with self._working():
                self.stream.sync()
                self.copies.sync()
        finally:
            self._aside.clear()
            del self._scratch
            self.stream.close()
            self.copies.close()

    def _working(self) -> Any:
        return saying(
            f"device {self.index} failed in a step or a copy. After most such failures the process has to be started anew "
            f"to use this GPU"
        )


@contextmanager
def saying(what: str) -> Iterator[None]:
    """Makes an EngineError of what the driver raises."""
    try:
        yield
    except RMTError:
        raise
    except Exception as err:  # the driver's own errors share no base class across versions
        raise EngineError(f"{what}. The driver says: {one_line(err)}") from err


def one_line(err: Exception) -> str:
    """An error of a library's as one line of at most 500 characters."""
    return " ".join(str(err).split())[:500] or type(err).__name__
