"""What comes out of a run: a piece per segment, a result per document, a batch of results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np

from rmt_trt.contract import StepSpec
from rmt_trt.errors import ContractError
from rmt_trt.runtime.state import State
from rmt_trt.runtime.track import Track


@dataclass(frozen=True, eq=False)
class Piece:
    """One document after one segment. Arrays belong to the caller.

    row     the document's place in the batch, 0 for a single one
    index   the segment's number in the document, earlier parts counted
    start, stop   the tokens of this run that it covers, as positions in the document (dropped ids not counted);
                  pending tokens of a resumed state were covered by the earlier run and are left out
    logits  classifier (c,); language model (stop - start, v), or (v,) of the last token with logits="last"; or None.
            With logits="last" those of the document's last segment, and of the one before a language model's short
            last one; the others have none
    loglik  language model with logits="loglik": (stop - start,) float64, nats; nan for a document's first token
    loglik_sum  the sum over the document so far, earlier parts included; None if one of them was not scored
    states  with memory=True: the states after the segment, each (*shape); else ()
    """

    row: int
    index: int
    start: int
    stop: int
    logits: np.ndarray | None = None
    loglik: np.ndarray | None = None
    loglik_sum: float | None = None
    states: tuple[np.ndarray, ...] = ()

    @property
    def memory(self) -> np.ndarray | None:
        """The first state after the segment, (M, d), or None unless memory=True was asked for."""
        return self.states[0] if self.states else None


@dataclass(frozen=True, eq=False)
class RunResult:
    """One document's answer.

    logits      classifier: (c,) after the last segment, or (segments, c) with logits="all"; language model: (v,) of
                the last token, or (tokens, v) with logits="all"; None with "none" and "loglik"
    states      after the last segment, short or not: arrays (*shape) by state name
    on_device   whether logits and states were left where the engine computed them: then they are arrays that speak
                DLPack, each with a leading axis of 1: (1, c) or (1, v), (1, *shape); there is no label and no state.
                They hold their values; keep them until work of your own that reads them is done, since memory that is
                let go of serves later steps
    segments    segments that this run stepped through
    tokens      tokens that this run took, dropped ids not counted
    label       the answer's name, where the model names its classes
    loglik      language model with logits="loglik": (tokens,) float64, nats; nan for a document's first token
    loglik_sum  the sum over the whole document, earlier parts included; None if one was not scored
    """

    logits: Any
    states: dict[str, Any]
    segments: int
    tokens: int
    label: str | None = None
    loglik: np.ndarray | None = None
    loglik_sum: float | None = None
    on_device: bool = False
    _state: State | None = field(default=None, repr=False)
    _alignment: str = field(default="left", repr=False)

    @property
    def memory(self) -> Any:
        """The first state after the last segment, which of an RMT is its memory, (M, d)."""
        return next(iter(self.states.values()))

    @property
    def state(self) -> State:
        """Where the document can go on: `rt.run(next_part, state=out.state)`.

        Errors: ContractError after a run with alignment "right" or "center": there a cut changes the segmentation,
        so that two parts never give what the whole gives; and after one with on_device=True, which fetches nothing.
        """
        if self.on_device:
            raise ContractError(
                "this run left its answer on the device (on_device=True) and kept no state. To go on from it, run "
                "without on_device"
            )
        if self._state is None:
            raise ContractError(
                f"this run cut the document with alignment='{self._alignment}', where a document in two parts is cut "
                f"differently from the whole. To stop and go on, run every part with alignment='left'"
            )
        return self._state


def answered(
    track: Track,
    spec: StepSpec,
    state: State | None,
    logits: Any = None,
    row: np.ndarray | None = None,
    loglik: np.ndarray | None = None,
    loglik_sum: float | None = None,
    on_device: bool = False,
) -> RunResult:
    """The result of a track that has ended. row: the last token's logits, out of which the label is named."""
    return RunResult(
        logits=logits,
        states=dict(zip((one.input for one in spec.states), track.final or (), strict=True)),
        segments=track.steps,
        tokens=track.tokens,
        label=spec.id2label[int(np.argmax(row))] if row is not None and spec.id2label else None,
        loglik=loglik,
        loglik_sum=loglik_sum,
        on_device=on_device,
        _state=state,
        _alignment=track.alignment,
    )


class BatchResult(Sequence[RunResult]):
    """The answers of a batch, in the order of its documents; fields stack where every document has them."""

    def __init__(self, results: Sequence[RunResult]) -> None:
        self._results = tuple(results)

    @overload
    def __getitem__(self, index: int) -> RunResult: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[RunResult, ...]: ...
    def __getitem__(self, index: int | slice) -> RunResult | tuple[RunResult, ...]:
        return self._results[index]

    def __len__(self) -> int:
        return len(self._results)

    @property
    def logits(self) -> np.ndarray:
        """(batch, c) or (batch, v). Errors: ContractError, where documents have logits of different shapes or none."""
        self._on_host()
        rows = [result.logits for result in self._results]
        shapes = {None if row is None else row.shape for row in rows}
        if None in shapes or len(shapes) != 1:
            raise ContractError(
                "the documents' logits do not stack into one array; read them one by one: out[i].logits"
            )
        return np.stack([row for row in rows if row is not None])

    @property
    def memory(self) -> np.ndarray:
        """(batch, M, d). Errors: ContractError, where the documents' memories lie on a device."""
        self._on_host()
        return np.stack([result.memory for result in self._results])

    def _on_host(self) -> None:
        if any(result.on_device for result in self._results):
            raise ContractError(
                "the documents' arrays lie on the device, one by one (on_device=True); read them as out[i].logits and "
                "out[i].memory"
            )

    @property
    def segments(self) -> list[int]:
        return [result.segments for result in self._results]

    @property
    def tokens(self) -> list[int]:
        return [result.tokens for result in self._results]

    @property
    def labels(self) -> list[str | None]:
        return [result.label for result in self._results]

    @property
    def loglik_sum(self) -> list[float | None]:
        return [result.loglik_sum for result in self._results]

    @property
    def state(self) -> list[State]:
        """One per document. Errors: as `RunResult.state`."""
        return [result.state for result in self._results]
