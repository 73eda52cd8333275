"""The package as others get it: built as a wheel, it carries ``conf/`` and the report's template."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.full
def test_an_installed_wheel_has_its_configuration(tmp_path):
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", str(ROOT), "--wheel-dir", str(tmp_path)]
    subprocess.run(pip, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    unpacked = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(unpacked)
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    plan = [sys.executable, "-m", "align_loop", "plan", "+experiment=selfie_iter4", "setting=embedded_small"]
    done = subprocess.run(plan, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "iteration-4/evaluate" in done.stdout
    where = [sys.executable, "-c", "import align_loop; print(align_loop.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert str(unpacked) in found.stdout and (unpacked / "align_loop/report/report.html.j2").is_file()
