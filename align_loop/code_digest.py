"""What code is, by content: the digest of the modules behind a stage, without comments and formatting.

Only source text is read; nothing is imported, so planning stays fast and a user's part may import what it likes.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from align_loop.digest import config_digest
from align_loop.errors import UserError


def code_digest(dotted: Sequence[str], package: str = "align_loop") -> tuple[str, dict[str, str]]:
    """The digest of the code behind ``dotted`` names, and the digest of each module file in it.

    Names are functions, classes or modules: ``package.module:function`` or ``package.module.Class``. The code is
    their modules plus everything of ``package`` that those import, directly or not, at the top or inside a
    function. A module outside ``package`` (a user's own part) counts by its own file alone. Comments, docstrings
    and formatting don't count. A package's ``__init__`` counts only where something is imported from it.

    The second value maps a file's path as seen from its import root (``align_loop/record.py``) to its digest.
    Raises ``UserError`` when no module of that name can be found.
    """
    pending = [_module_of(name) for name in dotted]
    digests: dict[str, str] = {}
    while pending:
        module = pending.pop()
        file = source_file(module)
        if file is None:  # a namespace package has no code of its own
            continue
        label = _label(module, file)
        if label in digests:
            continue
        digests[label], imports = _module_digest(file, module, *_stamp(file))
        if _is_within(module, package):
            pending += [found for name in imports if (found := _import_target(*name, package))]
    return config_digest(digests), dict(sorted(digests.items()))


def source_file(module: str) -> Path | None:
    """The Python file of a module, found without importing it; None if there is none."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # a module made by hand, such as __main__
        return None
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for location in spec.submodule_search_locations or []:
        base = Path(location).joinpath(*rest)
        for candidate in (base / "__init__.py", base.with_name(base.name + ".py")):
            if candidate.is_file():
                return candidate
    return None


def _stamp(file: Path) -> tuple[int, int]:
    stat = os.stat(file)
    return stat.st_mtime_ns, stat.st_size


def _module_of(dotted: str) -> str:
    names = dotted.replace(":", ".").split(".")
    for end in range(len(names), 0, -1):
        module = ".".join(names[:end])
        if all(names) and source_file(module) is not None:
            return module
    raise UserError(f"{dotted}: no Python module of this name can be found; check the spelling and PYTHONPATH")


def _label(module: str, file: Path) -> str:
    parts = module.replace(".", "/")
    return f"{parts}/__init__.py" if file.name == "__init__.py" else f"{parts}.py"


def _is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def _import_target(module: str, name: str | None, package: str) -> str | None:
    """The module inside ``package`` that ``import module`` or ``from module import name`` reads, if any."""
    if not _is_within(module, package):
        return None
    if name is not None and source_file(f"{module}.{name}") is not None:
        return f"{module}.{name}"
    return module


@functools.cache
def _module_digest(file: Path, module: str, _mtime_ns: int, _size: int) -> tuple[str, list[tuple[str, str | None]]]:
    """The digest of one source file, and the (module, name) pairs of its imports. Time and size end the memory."""
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError as error:
        raise UserError(f"{file}, line {error.lineno}: {error.msg}") from error
    parent = module if file.name == "__init__.py" else module.rpartition(".")[0]
    imports = _imports(tree, parent)
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    # Unparsed text rather than ``ast.dump``: the latter changes between versions of Python.
    return hashlib.sha256(ast.unparse(tree).encode("utf-8", "surrogatepass")).hexdigest(), imports


def _imports(tree: ast.AST, parent: str) -> list[tuple[str, str | None]]:
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = parent.split(".")[: len(parent.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            found += [(module, alias.name) for alias in node.names]
    return found
