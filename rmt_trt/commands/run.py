"""rmt-run: a bundle over tokens or text of any length."""

from __future__ import annotations

import io
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rmt_trt.commands.app import Debug, Version, console, new_app, run_command
from rmt_trt.commands.inputs import read_input
from rmt_trt.errors import ContractError, EngineError, TokenError
from rmt_trt.files import check_target, write_file
from rmt_trt.runtime import BatchResult, RMTRuntime, RunResult, Stream

app = new_app()


@app.command()
def run(
    bundle: Annotated[Path, typer.Argument(help="A bundle (NAME.rmt), an ONNX graph, or a checkpoint.")],
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="ids.npy, a text file, or - for standard input.")],
    engine: Annotated[str, typer.Option(help="auto, cpu, cuda, tensorrt, tensorrt-rtx or torch.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="fp32, fp16, bf16, int8, fp8.")] = None,
    device: Annotated[int, typer.Option(help="GPU index.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads. [default: all cores]")] = None,
    ids: Annotated[bool, typer.Option("--ids", help="INPUT is a text of whole numbers: token ids.")] = False,
    alignment: Annotated[str | None, typer.Option(help="left, right, center. [default: the model's]")] = None,
    logits: Annotated[str, typer.Option(help="last, all, none; loglik for a language model.")] = "last",
    max_segments: Annotated[int | None, typer.Option(help="A limit of your own.")] = None,
    max_batch: Annotated[int, typer.Option(help="Documents of a batch that are stepped together.")] = 64,
    overflow: Annotated[str, typer.Option(help="Beyond the limit: error, or keep the head or tail.")] = "error",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Write .json or .npz. [default: JSON, printed]")
    ] = None,
    save_state: Annotated[Path | None, typer.Option(help="Save the state here, also when interrupted.")] = None,
    load_state: Annotated[Path | None, typer.Option(help="Go on from a saved state.")] = None,
    skip: Annotated[int, typer.Option(min=0, help="Pass over this many tokens of INPUT.")] = 0,
    debug: Debug = False,
    version: Version = False,
) -> None:
    """Reads INPUT segment by segment at constant memory and prints the answer.

    A state is kept with --alignment left: what is saved there goes on with --load-state, bit for bit.
    """
    if out is not None and out.suffix not in (".json", ".npz"):
        raise ContractError(f"--out is {out}; expected a name that ends in .json or .npz")
    if logits == "all" and (out is None or out.suffix != ".npz"):
        raise ContractError(
            "--logits all gives a row for every token or segment, which goes into an array: add -o FILE.npz"
        )
    for target in (out, save_state):
        if target is not None:  # said before the run, not behind it
            check_target(target)
    screen = console()
    with RMTRuntime(bundle, engine, dtype, device, threads, max_batch) as runtime:
        if save_state is not None and (alignment or runtime.spec.alignment) != "left":
            raise ContractError(
                f"--save-state needs --alignment left (the model's own is '{runtime.spec.alignment}'): a document in two "
                f"parts is cut differently from the whole with any other"
            )
        tokens = read_input(source, ids, skip)
        if isinstance(tokens, str):
            tokens = runtime.encode(tokens)
        state = None if load_state is None else runtime.load_state(load_state)
        options: dict[str, Any] = {
            "alignment": alignment, "logits": logits, "max_segments": max_segments, "overflow": overflow,
        }  # fmt: skip
        stream, started = None, time.perf_counter()
        if save_state is not None or logits not in ("last", "none"):
            # Segment by segment: only there is a state to be kept at any moment, and rows to be let go.
            stream = runtime.stream(tokens, state, **options, keep=out is not None and out.suffix == ".npz")
            if save_state is not None and isinstance(stream.state, list):
                raise ContractError(
                    f"--save-state {save_state} goes with one document, not with a batch; save states from Python instead"
                )
        try:
            with _shown(screen, _total(tokens)) as show:
                result = (
                    runtime.run(tokens, state, **options, on_progress=show) if stream is None else _drive(stream, show)
                )
        except KeyboardInterrupt:
            _keep("interrupted", stream, save_state, skip, load_state, runtime, screen)
            raise SystemExit(130) from None
        except (TokenError, EngineError):
            if save_state is not None:
                _keep("stopped", stream, save_state, skip, load_state, runtime, screen)
            raise
        seconds = time.perf_counter() - started
        if save_state is not None and stream is not None:
            stream.state.save(save_state)
        _write(result, out, _facts(runtime, result, seconds))
        screen.print(_summary(runtime, result, seconds))


def _drive(stream: Stream, show: Callable[[int], None]) -> RunResult | BatchResult:
    """Takes every piece of a stream, telling of each."""
    tokens = 0
    for piece in stream:
        tokens += piece.stop - piece.start
        show(tokens)
    return stream.result


@contextmanager
def _shown(screen: Console, total: int | None) -> Iterator[Callable[[int], None]]:
    """A function that takes the number of tokens done and shows it, with tokens per second, time left and peak memory."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"),
               TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=screen, disable=not screen.is_terminal, refresh_per_second=4) as bars:
        task = bars.add_task("running", total=total, rate="")
        started = shown = time.perf_counter()
        done = 0

        def show(tokens: int) -> None:
            nonlocal shown, done
            done = tokens
            if (now := time.perf_counter()) - shown >= 0.25:
                shown = now
                rate = f"{tokens / (now - started):,.0f} tokens/s, {peak_memory_mb():,.0f} MB"
                bars.update(task, completed=tokens, rate=rate)

        yield show
        bars.update(task, completed=total if total is not None else done)


def _total(tokens: Any) -> int | None:
    return int(tokens.size) if isinstance(tokens, np.ndarray) else None


def _keep(
    what: str,
    stream: Stream | None,
    save_state: Path | None,
    skip: int,
    load_state: Path | None,
    runtime: RMTRuntime,
    screen: Console,
) -> None:
    """Saves the state of a run that was broken off, and says how to go on."""
    if save_state is None or stream is None:
        screen.print(f"{what}; nothing was saved (--save-state FILE would have kept the state)")
        return
    state = stream.state
    state.save(save_state)
    before = runtime.load_state(load_state).tokens_read if load_state is not None else 0
    screen.print(
        f"{what} after {state.position} tokens of the document; the state is in {save_state}. Go on with: "
        f"--load-state {save_state} --skip {skip + state.tokens_read - before}"
    )


def _facts(runtime: RMTRuntime, result: RunResult | BatchResult, seconds: float) -> dict[str, Any]:
    documents = [_document(one, runtime) for one in (result if isinstance(result, BatchResult) else [result])]
    facts: dict[str, Any] = documents[0] if isinstance(result, RunResult) else {"documents": documents}
    tokens = sum(document["tokens"] for document in documents)
    return facts | {
        "engine": runtime.engine,
        "dtype": runtime.dtype,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
        "peak_memory_mb": round(peak_memory_mb(), 1),
    }


def _document(result: RunResult, runtime: RMTRuntime) -> dict[str, Any]:
    facts: dict[str, Any] = {"tokens": result.tokens, "segments": result.segments}
    if result.label is not None:
        facts["answer"] = result.label
    if result.logits is not None and runtime.spec.logits == "classifier" and result.logits.ndim == 1:
        facts["logits"] = [round(float(value), 6) for value in result.logits]
    if result.logits is not None and runtime.spec.logits == "lm" and result.logits.ndim == 1:
        facts["next_token"] = int(np.argmax(result.logits))
    if result.loglik_sum is not None:
        facts["loglik_sum"] = result.loglik_sum
    return facts


def _write(result: RunResult | BatchResult, out: Path | None, facts: dict[str, Any]) -> None:
    text = json.dumps(facts, indent=2)
    if out is None:
        print(text)
    elif out.suffix == ".json":
        write_file(out, (text + "\n").encode())
    else:
        arrays: dict[str, np.ndarray] = {"facts": np.array(text)}
        for index, one in enumerate(result if isinstance(result, BatchResult) else [result]):
            mark = f"_{index}" if isinstance(result, BatchResult) else ""
            arrays |= {f"{name}{mark}": value for name, value in one.states.items()}
            arrays |= {
                f"{name}{mark}": value for name in ("logits", "loglik") if (value := getattr(one, name)) is not None
            }
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        write_file(out, buffer.getvalue())


def _summary(runtime: RMTRuntime, result: RunResult | BatchResult, seconds: float) -> str:
    tokens = sum(result.tokens) if isinstance(result, BatchResult) else result.tokens
    segments = sum(result.segments) if isinstance(result, BatchResult) else result.segments
    documents = f"{len(result)} documents, " if isinstance(result, BatchResult) else ""
    return (
        f"{documents}{tokens:,} tokens, {segments:,} segments in {seconds:.1f} s: {tokens / seconds:,.0f} tokens/s on "
        f"{runtime.engine} ({runtime.dtype}), peak memory {peak_memory_mb():,.0f} MB"
    )


def peak_memory_mb() -> float:
    """Most memory that this process has held so far, in MB (10**6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def main() -> None:
    """Console entry point."""
    run_command("rmt-run", app)
