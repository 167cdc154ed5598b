"""The end of a run says what was not tested, and where CI is true nothing may be skipped without need."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = """
import pytest

@pytest.mark.skip(reason="needs a GPU")
@pytest.mark.parametrize("precision", ["16", "32"])
def test_on_a_gpu(precision): ...

def test_export():
    pytest.importorskip("no_such_package")
"""


@pytest.mark.slow
def test_a_skip_without_need_is_named_and_fails_the_run(tmp_path: Path) -> None:
    here = Path(__file__).resolve()
    shutil.copy(here.with_name("conftest.py"), tmp_path)
    (tmp_path / "test_some.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", str(here.parents[1] / "pyproject.toml")]
    done = subprocess.run(
        [*command, "--rootdir", str(tmp_path), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=os.environ | {"CI": "true"},
    )
    assert done.returncode == 1, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert "for want of a GPU (needs a GPU):" in said
    assert "  test_some.py::test_on_a_gpu (2 cases)" in said
    [failed] = [line for line in said if line.startswith("FAILED")]
    assert "CI is true, and nothing keeps test_some.py::test_export from running" in failed
    assert "no_such_package" in failed
