"""The digest of code: any line that runs counts, wherever it is imported; comments and formatting don't."""

from __future__ import annotations

import importlib
import itertools
import sys
from pathlib import Path

import pytest

from align_loop.code_digest import code_digest
from align_loop.errors import UserError

FILES = {
    "__init__.py": '"""The package."""\n__version__ = "1"\n',
    "parts/__init__.py": "",
    "parts/sampler.py": (
        '"""Docstring."""\nfrom {p}.record import rows\n\n\ndef sample(config, inputs, context):\n'
        '    """More."""\n    from {p} import late\n    from . import helper\n    return rows, late, helper\n'
    ),
    "parts/helper.py": "import {p}.deep.scale\n",
    "parts/unrelated.py": "x = 1\n",
    "record.py": "def rows():\n    return 1\n",
    "late.py": "y = 2\n",
    "deep/__init__.py": "",
    "deep/scale.py": "import json\nz = 3\n",
}
USED = ["parts/sampler.py", "parts/helper.py", "record.py", "late.py", "deep/scale.py"]
_numbers = itertools.count()


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A small package of its own name, importable in this process."""
    name = f"tiny_package_{next(_numbers)}"
    for file, text in FILES.items():
        (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name / file).write_text(text.replace("{p}", name))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return tmp_path / name


def of(package: Path, *dotted: str) -> tuple[str, dict[str, str]]:
    names = dotted or ("parts.sampler:sample",)
    return code_digest([f"{package.name}.{name}" for name in names], package.name)


def edit(file: Path, extra: str) -> None:
    file.write_text(file.read_text() + extra)


def test_the_closure_holds_late_and_relative_imports_and_nothing_else(package):
    assert sorted(of(package)[1]) == sorted(f"{package.name}/{file}" for file in USED)
    assert package.name not in sys.modules  # found without importing


@pytest.mark.parametrize("file", USED)
def test_a_line_in_any_file_of_the_closure_changes_it_and_is_named(package, file):
    digest, modules = of(package)
    edit(package / file, "\nnew = 1\n")
    after, modules_after = of(package)
    assert after != digest
    assert {name for name in modules if modules[name] != modules_after[name]} == {f"{package.name}/{file}"}


def test_comments_docstrings_formatting_and_other_files_do_not(package):
    digest = of(package)[0]
    edit(package / "parts/unrelated.py", "new = 1\n")
    edit(package / "__init__.py", "new = 1\n")  # such as the version number
    sampler = package / "parts/sampler.py"
    text = sampler.read_text().replace('"""Docstring."""', '"""Another."""').replace('    """More."""\n', "")
    sampler.write_text(
        "# comment\n" + text.replace("rows, late, helper\n", "(\n        rows, late,  # why\n helper)\n")
    )
    assert of(package)[0] == digest


def test_strings_that_are_not_docstrings_count(package):
    edit(package / "record.py", 'PROMPT = """Judge this."""\n')
    digest = of(package)[0]
    record = package / "record.py"
    record.write_text(record.read_text().replace("Judge this", "Judge that"))
    assert of(package)[0] != digest


def test_a_class_of_hydra_and_a_function_name_the_same_module(package):
    assert of(package, "parts.helper.Any.method") == of(package, "parts.helper:any") == of(package, "parts.helper")


def test_parts_add_to_the_digest(package):
    alone, both = of(package), of(package, "parts.sampler:sample", "parts.unrelated.Part")
    assert set(both[1]) - set(alone[1]) == {f"{package.name}/parts/unrelated.py"}
    assert both[0] != alone[0]


def test_a_users_own_module_counts_by_its_file_alone(package, tmp_path):
    (tmp_path / "my_part.py").write_text(f"import {package.name}.record\nimport my_helper\n")
    (tmp_path / "my_helper.py").write_text("a = 1\n")
    digest, modules = code_digest(["my_part.MyPart"], package.name)
    assert list(modules) == ["my_part.py"]
    edit(tmp_path / "my_part.py", "b = 1\n")
    assert code_digest(["my_part.MyPart"], package.name)[0] != digest


def test_unknown_and_broken_modules_are_named(package):
    with pytest.raises(UserError, match=r"no_such_package\.parts\.Thing: no Python module"):
        code_digest(["no_such_package.parts.Thing"])
    edit(package / "record.py", "def (\n")
    with pytest.raises(UserError, match=r"record\.py, line 3"):
        of(package)
