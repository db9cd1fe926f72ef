"""TensorRT in all its flavours: the recurrence wholly on the GPU, replayed from captured CUDA graphs.

A bundle has an engine file with logits, and for language models one without, which runs wherever none are asked for. On
each bucket (`rmt_trt.runtime.buckets`) an engine has a context, run and captured from memory A to B and from B to A.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rmt_trt.contract import SEGMENT, Answer, Head, StepSpec
from rmt_trt.errors import ContractError
from rmt_trt.runtime import cuda, device_rows, engine_files
from rmt_trt.runtime.buckets import Bucket, Replay, States, new_bucket
from rmt_trt.runtime.engine_files import EngineFile
from rmt_trt.runtime.engines.tensorrt_contexts import ContextReplay, LoadedEngine, let_go
from rmt_trt.runtime.engines.tensorrt_versions import PROFILE, DeviceMemory
from rmt_trt.runtime.worker import on_worker

if TYPE_CHECKING:
    from rmt_trt.runtime.source import Source


@dataclass(frozen=True)
class Flavour:
    """What the table of engines asks of one: by its name in the contract."""

    name: str

    def refusal(self, source: Source, dtype: str | None, device: int) -> str | None:
        """Why this engine cannot run the source, or None."""
        return engine_files.refusal(source, self.name, dtype, device)

    def open_engine(self, source: Source, dtype: str | None, device: int, threads: int | None) -> TensorRTEngine:
        """Errors: EngineError, where this machine can run no engine file of the source; otherwise as `LoadedEngine`."""
        return TensorRTEngine(self.name, engine_files.runnable(source, self.name, dtype, device), source.spec, device)


TENSORRT, TENSORRT_RTX = Flavour("tensorrt"), Flavour("tensorrt-rtx")


class TensorRTEngine:
    """Engine files behind the engine contract: "all" of them with logits, and where there is one "none" without.

    max_batch  documents that the files' profile takes
    """

    def __init__(self, name: str, files: Mapping[Head, EngineFile], spec: StepSpec, device: int) -> None:
        self.name, self.dtype = name, files["all"].record.dtype
        self.max_batch: int = files["all"].record.profiles[PROFILE][SEGMENT]["max"][0]
        self._spec, self._files = spec, files
        self._loaded: dict[Path, LoadedEngine] = {}
        self._buckets: dict[int, Bucket] = {}
        self._gpu: Any = None
        self._closed = False
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="rmt-trt-tensorrt")
        try:
            self._open(device)
        except BaseException:
            self.close()
            raise

    @property
    def device_memory(self) -> dict[str, DeviceMemory]:
        """By the names of the engine files that are loaded. One with logits is loaded when some are first asked for."""
        return {path.name: loaded.memory for path, loaded in self._loaded.items()}

    @on_worker
    def _open(self, device: int) -> None:
        try:
            self._gpu = cuda.Gpu(device)
            with self._gpu.current():
                self._replay(self._bucket(1), "none")  # so that the first step is not slower than the others
        except BaseException as err:
            let_go(err)
            raise

    @on_worker
    def load(self, states: tuple[np.ndarray, ...]) -> States:
        with self._gpu.current():
            return device_rows.load(self._gpu, self._spec, states)

    @on_worker
    def fetch(self, states: States) -> tuple[np.ndarray, ...]:
        with self._gpu.current():
            return device_rows.fetch(self._gpu, self._spec, states)

    @on_worker
    def share(self, states: States) -> tuple[Any, ...]:
        with self._gpu.current():
            return device_rows.share(self._gpu, self._spec, states)

    @on_worker
    def take(self, parts: Sequence[States], rows: np.ndarray) -> States:
        with self._gpu.current():
            return device_rows.take(self._gpu, self._spec, parts, rows)

    @on_worker
    def step(self, states: States, segment: np.ndarray, head: Head, host: bool = True) -> tuple[States, Answer | None]:
        with self._gpu.current():
            bucket, block = self._bucket(len(segment)), device_rows.padded(self._spec, segment)
            if head == "none":
                return self._through(bucket, self._replay(bucket, "none"), states, block), None
            replay = self._replay(bucket, "all")
            new = self._through(bucket, replay, states, block)
            found = device_rows.answer(self._gpu, self._spec, replay.outputs, segment, head, host)
            if head == "last" and "none" in self._files:
                # Two builds may round differently. What a document's memory is must not depend on where it was cut, so it
                # comes from the engine that carries it through all other segments.
                new = self._through(bucket, self._replay(bucket, "none"), states, block)
            return new, found

    @on_worker
    def steps(self, states: States, segments: np.ndarray) -> States:
        with self._gpu.current():
            bucket = self._bucket(segments.shape[1])
            return self._through(bucket, self._replay(bucket, "none"), states, segments)

    @on_worker
    def replay(self, batch: int, steps: int) -> None:
        """Replays full segments alone, from A to B and back, and waits: what the driver is measured by."""
        with self._gpu.current():
            bucket = self._bucket(batch)
            replay = self._replay(bucket, "none")
            for number in range(steps):
                replay.run(number % 2)
            self._gpu.wait()

    def close(self) -> None:
        """Releases everything; a second time is nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            self._release()
        finally:
            self._worker.shutdown()

    @on_worker
    def _release(self) -> None:
        """Graphs, contexts, engines, then the memory that they were bound to, then the streams; so does a failed GPU's."""
        if self._gpu is None:
            return
        gpu, self._gpu = self._gpu, None
        with gpu.current():
            try:
                gpu.wait()
            finally:
                with cuda.CAPTURING:
                    for size in self._buckets:
                        _release_replays(self._buckets[size])
                    while self._loaded:
                        self._loaded.popitem()[1].release()
                    self._buckets.clear()
                    gpu.close()

    def _through(self, bucket: Bucket, replay: Replay, states: States, segments: np.ndarray) -> States:
        return device_rows.through(self._gpu, self._spec, bucket, replay, states, segments, "TensorRT")

    def _bucket(self, batch: int) -> Bucket:
        """The least bucket for so many documents: 1, 2, 4, ... and the largest that the profile takes."""
        if batch > self.max_batch:
            raise ContractError(
                f"a step of {batch} documents; engine '{self._files['all'].path.name}' takes at most {self.max_batch}. Step "
                f"fewer together (max_batch, slots), or build the engine with --max-batch {batch}"
            )
        size = min(1 << (batch - 1).bit_length(), self.max_batch)
        if size not in self._buckets:
            self._buckets[size] = new_bucket(self._gpu, self._spec, size)
        return self._buckets[size]

    def _replay(self, bucket: Bucket, head: Head) -> Replay:
        """A step on a bucket that gives logits ("all"), or none where there is an engine without."""
        file = self._files.get(head, self._files["all"])
        if file.path not in bucket.replays:
            with cuda.CAPTURING:  # what the library allocates would spoil a capture of ONNX Runtime's
                if file.path not in self._loaded:
                    self._loaded[file.path] = LoadedEngine(self._gpu, file, self._spec)
                bucket.replays[file.path] = self._loaded[file.path].replay(bucket)
        return bucket.replays[file.path]


def _release_replays(bucket: Bucket) -> None:
    while bucket.replays:
        _, replay = bucket.replays.popitem()
        if isinstance(replay, ContextReplay):
            replay.release()
