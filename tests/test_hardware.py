"""The rule that a skip for absent hardware can be made a failure."""

from __future__ import annotations

import pytest
from hardware import require_hardware, required_hardware


def test_absent_hardware_skips_with_its_reason(monkeypatch):
    monkeypatch.delenv("RMT_REQUIRE", raising=False)
    with pytest.raises(pytest.skip.Exception, match="needs cuda: no driver"):
        require_hardware("cuda", "no driver")


def test_required_hardware_fails_where_it_is_absent(monkeypatch):
    monkeypatch.setenv("RMT_REQUIRE", "tensorrt, cuda")
    with pytest.raises(pytest.fail.Exception, match="RMT_REQUIRE asks for cuda: no driver"):
        require_hardware("cuda", "no driver")
    with pytest.raises(pytest.skip.Exception, match="needs tensorrt-rtx"):
        require_hardware("tensorrt-rtx", "no GPU that it knows")


def test_present_hardware_lets_the_test_go_on(monkeypatch):
    monkeypatch.setenv("RMT_REQUIRE", "cuda")
    require_hardware("cuda", None)


def test_a_misspelt_requirement_is_refused(monkeypatch):
    monkeypatch.setenv("RMT_REQUIRE", "cuda,tensort")
    with pytest.raises(ValueError, match="RMT_REQUIRE names tensort; expected some of cuda, tensorrt"):
        required_hardware()
