"""A user's own function as the judge: tests, exact answers, formats, anything that Python can check."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

from align_loop.annotators.job import Annotation, Job
from align_loop.annotators.judging import by_prompt, messages_of, score_row
from align_loop.errors import UserError
from align_loop.record import Row


@dataclass
class Verifier:
    """Reward = ``function(prompt_messages, answer_text, meta)``, a finite number, or true and false (1 and 0).

    ``function``: ``package.module:function``, found as any import is (the folder of the command, PYTHONPATH). Its
    module is part of the stage's key, so an edited function runs again; what it imports is not. ``meta``: the
    dictionary that the prompt's source keeps with the prompt. There is no time limit: a function that may hang must
    keep its own. What it raises stops the run and names the answer.
    """

    function: str

    def __post_init__(self) -> None:
        self._call()

    def code(self) -> list[str]:
        """The user's code that the result depends on."""
        return [self.function]

    def annotate(self, job: Job) -> Annotation:
        """The function's value for each answer. Raises ``UserError`` naming the answer it fails on."""
        call, messages = self._call(), messages_of(job)
        metas = {row["prompt_id"]: json.loads(row.get("meta") or "{}") for row in job.prompts}
        rows = []
        with job.context.progress(len(job.answers), "answers") as progress:
            for answers in by_prompt(job).values():
                for row in answers:
                    reward = self._value(call, row, messages[row["prompt_id"]], metas[row["prompt_id"]])
                    rows.append(score_row(row, reward))
                    progress.update()
        return Annotation(rows)

    def _value(self, call: Callable[..., Any], row: Row, messages: list, meta: dict) -> float:
        where = f"annotator.function={self.function}: answer {row['sample_id']} to prompt {row['prompt_id']}"
        try:
            value = call([dict(m) for m in messages], row["text"], dict(meta))
        except Exception as error:  # whatever a user's function raises
            raise UserError(f"{where}: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
        value = value.item() if hasattr(value, "item") else value  # numpy's and torch's numbers
        if not isinstance(value, Real) or not math.isfinite(value):
            raise UserError(f"{where}: it returned {value!r}; return a finite number, or true or false")
        return float(value)

    def _call(self) -> Callable[..., Any]:
        """The function; ``ValueError`` where there is none."""
        module, _, name = self.function.partition(":")
        if not module or not name:
            raise ValueError(f"annotator.function={self.function} must be of the form package.module:function")
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ImportError as error:
            raise ValueError(f"annotator.function={self.function}: {error}; is PYTHONPATH right?") from None
        if not callable(found):
            raise ValueError(f"annotator.function={self.function}: module {module} has no function {name!r}")
        return found
