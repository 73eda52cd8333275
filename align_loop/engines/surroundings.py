"""Leave the process as it was: threads, environment, global state and stderr around an engine's work."""

from __future__ import annotations

import gc
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

# vLLM replaces this function by one that does nothing; whoever trains afterwards needs the real one.
_set_num_threads = torch.set_num_threads


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run with ``count`` CPU threads (None: as many as now), and with the number there was afterwards."""
    before = torch.get_num_threads()
    _set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads = _set_num_threads
        _set_num_threads(before)


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Run with ``values`` in ``os.environ``, and put it back as it was.

    Variables that are set inside are added to ``values``, so that the next call with the same
    dictionary finds them again.
    """
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        for name in [name for name, value in os.environ.items() if before.get(name) != value]:
            values[name] = os.environ.pop(name)
        os.environ.update({name: value for name, value in before.items() if name not in os.environ})


@contextmanager
def global_state() -> Iterator[None]:
    """Put the random generators of Python, NumPy and torch (CPU), and the matmul precision back as they were."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    precision = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
        torch.set_float32_matmul_precision(precision)


@contextmanager
def no_collection() -> Iterator[None]:
    """Hold the garbage collector: an import makes a million lasting objects, and each pass walks them all."""
    held = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if held:
            gc.enable()


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Hold back what this process writes to stderr, C++ code included; show it after all when the block fails."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        saved = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            sys.stderr.flush()
            held.seek(0)
            os.write(saved, held.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
