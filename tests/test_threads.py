"""The CPU engine's threads: no more than the cores that its process may use."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from models import made

CODE = """
import os, sys
from pathlib import Path
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from rmt_trt.runtime.engines.cpu import open_session
for threads in (None, 3):
    print(open_session(Path(sys.argv[1]), threads).get_session_options().intra_op_num_threads)
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2 or not hasattr(os, "sched_setaffinity"), reason="one core, or not Linux")
def test_a_process_that_may_use_one_core_takes_one_thread_unless_told_otherwise() -> None:
    graph = made("bert").bundle / "step.onnx"
    done = subprocess.run([sys.executable, "-c", CODE, str(graph)], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["1", "3"], done.stderr
