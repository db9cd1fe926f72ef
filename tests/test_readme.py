"""Everything that README.md and docs/ show as runnable is run, in order, in a folder with examples/ beside it."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
from documents import blocks, first_command, run_program, script_of
from shared import once

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))]


def begin(folder: Path, command: str | None) -> None:
    """Makes a folder with examples/ in it and runs the command there."""
    shutil.copytree(ROOT / "examples", folder / "examples")
    if command is not None:
        done = run_program(script_of(f"```console\n$ {command}\n```\n", command), folder)
        assert done.returncode == 0, f"{command} fails:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_blocks_of_a_document_run_in_order(name, tmp_path):
    text = (ROOT / name).read_text(encoding="utf-8")
    command = first_command(text)  # several documents begin with the same one, which is run once for all of them
    begun = once(f"document-{hashlib.sha256(repr(command).encode()).hexdigest()}", lambda path: begin(path, command))
    folder = shutil.copytree(begun, tmp_path / "document")
    done = run_program(script_of(text, name, begun=command is not None), folder)
    assert done.returncode == 0, f"{name} does not run as it stands:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_command_of_ours_is_run_or_says_why_not(name, root):
    hidden = [
        f"{name}:{block.line}: {line}"
        for block in blocks((root / name).read_text(encoding="utf-8"))
        if block.not_run is None
        for line in block.text.splitlines()
        if line.startswith("rmt-") or (line.startswith("$ rmt-") and block.language != "console")
    ]
    assert not hidden, f"write '$ rmt-...' in a ```console block, or put <!-- not run: reason --> before it: {hidden}"


def test_python_blocks_share_a_namespace_and_follow_the_commands_before_them(tmp_path):
    text = (
        "```python\nfrom pathlib import Path\nx = 2\n```\n"
        "```console\n$ rmt-info --help > help.txt\nsome output\n$ make never\n```\n"
        "```python\nassert x == 2\nassert Path('help.txt').stat().st_size > 0\nPath('end').touch()\n```\n"
    )
    done = run_program(script_of(text, "doc.md"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "end").exists()


def test_a_document_whose_first_command_was_run_goes_on_behind_it(tmp_path):
    text = (
        "<!-- not run: why -->\n```python\n1 / 0\n```\n```console\n$ make\n```\n"
        "```console\n$ rmt-info none.rmt\n$ rmt-info --help > help.txt\n```\n```python\nopen('help.txt')\n```\n"
    )
    assert first_command(text) == "rmt-info none.rmt"
    done = run_program(script_of(text, "doc.md", begun=True), tmp_path)
    assert done.returncode == 0, done.stderr
    assert first_command("```python\n1\n```\n" + text) is first_command("text") is None


def test_a_block_that_fails_is_named_by_its_line(tmp_path):
    done = run_program(script_of("# Title\n\n```python\nok = 1\nassert ok == 2\n```\n", "doc.md"), tmp_path)
    assert done.returncode != 0
    assert 'File "doc.md", line 5' in done.stderr


def test_a_command_that_fails_fails_the_document(tmp_path):
    done = run_program(script_of("```console\n$ rmt-info no_such_bundle.rmt\n```\n", "doc.md"), tmp_path)
    assert done.returncode != 0
    assert "Command 'rmt-info no_such_bundle.rmt' returned non-zero" in done.stderr


def test_a_marked_block_is_not_run_and_the_mark_holds_for_one_block_only():
    text = "<!-- not run: needs a GPU -->\n\n```console\n$ rmt-bench x\n```\n\n```console\n$ rmt-info \\\n    y\n```\n"
    first, second = blocks(text)
    assert (first.not_run, first.commands) == ("needs a GPU", ["rmt-bench x"])
    assert (second.not_run, second.commands) == (None, ["rmt-info      y"])
    assert "rmt-bench" not in script_of(text, "doc.md")


def test_a_mark_without_a_reason_is_refused():
    with pytest.raises(ValueError, match="line 1: a mark 'not run' needs its reason"):
        blocks("<!-- not run -->\n```python\n1\n```\n")


def test_a_fence_that_is_never_closed_is_refused():
    with pytest.raises(ValueError, match="line 2: the fence is never closed"):
        blocks("text\n```python\n1\n")
