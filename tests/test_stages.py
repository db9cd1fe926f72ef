"""The bars of a command's stages."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from rmt_trt.commands.stages import shown_stages
from rmt_trt.errors import VerificationError

ROW = {"segment": 1, "memory": 0.5, "logits": 0.25}
REPORT: dict[str, Any] = {
    "engine": "cpu", "dtype": "int8", "reference": "fp32 graph", "rows": [ROW], "octaves": [], "batch_memory": 0.5,
    "batch_logits": 0.25, "memory_effect": 0.1, "passed": False, "tolerance": 0.1, "worst": 0.5,
}  # fmt: skip


def terminal(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120)


def told(screen: Console) -> str:
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def test_each_stage_gets_one_bar_and_keeps_the_words_behind_its_name() -> None:
    screen = terminal(True)
    with shown_stages(screen, {"verify": "verifying", "build": "building the engine"}) as show:
        show("verify", 0, 4)
        show("build fp16 all", 1, 2)
        show("verify", 4, 4)
    last = told(screen).rsplit("verifying", 1)[1]
    assert "100%" in last.split("building the engine, fp16 all")[0]
    assert "50%" in last.split("building the engine, fp16 all")[1]


@pytest.mark.parametrize("report", [REPORT, {"graph": "x.onnx"}], ids=["rows", "no rows"])
def test_a_verification_that_fails_is_shown_and_goes_on(report: dict[str, Any]) -> None:
    screen = terminal(False)
    with pytest.raises(VerificationError, match="drifts"), shown_stages(screen, {}):
        raise VerificationError("it drifts", report)
    assert ("engine cpu (int8) against the fp32 graph" in told(screen)) == ("rows" in report)
