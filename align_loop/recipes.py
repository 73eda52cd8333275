"""The recipes of ``conf/experiment``: what each is, from its head comment and from what it composes to.

A recipe's head comment is its documentation. The first sentence says what it does; then paragraphs that begin with one
of ``FIELDS`` and go on until the next:

    # Paper: who, when, title, identifier.
    # Differs: what is different here, and why.
    # Seen: the numbers, with setting and seeds.
    #   python -m align_loop +experiment=NAME
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align_loop.compose import compose_node, conf_dir
from align_loop.errors import UserError
from align_loop.parts import nearest

FIELDS = ("Paper", "Differs", "Seen")


@dataclass
class Recipe:
    """``summary``: what it does; ``fields``: the paragraphs of ``FIELDS``; ``command``: how to run it."""

    name: str
    summary: str
    fields: dict[str, str] = field(default_factory=dict)
    command: str = ""

    @property
    def status(self) -> str:
        """``measured`` where the head comment has numbers, else ``runs`` (every recipe is run by the tests)."""
        return "measured" if "Seen" in self.fields else "runs"


def all_recipes() -> list[Recipe]:
    """Every recipe, by name."""
    return [read_recipe(path) for path in sorted((conf_dir() / "experiment").glob("*.yaml"))]


def read_recipe(path: Path) -> Recipe:
    """The head comment of a recipe's file: its comment lines before the first key."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            lines.append(line.removeprefix("#").removeprefix(" "))
    command = next((line.strip() for line in lines if line.strip().startswith("python -m align_loop")), "")
    paragraphs: list[str] = []
    for line in (line for line in lines if not line.strip().startswith("python -m")):
        if not paragraphs or line.split(":")[0] in FIELDS:
            paragraphs.append(line)
        else:
            paragraphs[-1] += f" {line.strip()}"
    named = {p.split(":")[0]: p.partition(":")[2].strip() for p in paragraphs[1:]}
    return Recipe(path.stem, (paragraphs or [""])[0].strip(), named, command)


def table() -> str:
    """One line a recipe: name, status, paper, and the parts that make it."""
    recipes = all_recipes()
    rows = [(r.name, r.status, _short(r.fields.get("Paper", "-")), parts_of(compose(r.name))) for r in recipes]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]) for row in rows]
    return "\n".join([*lines, "", "python -m align_loop recipes NAME explains one."])


def explain(name: str) -> str:
    """What one recipe is, its steps and its parts. Raises ``UserError`` for a name that there is not."""
    recipes = {recipe.name: recipe for recipe in all_recipes()}
    if name not in recipes:
        raise UserError(f"recipes {name}: no such recipe; {nearest(name, recipes)}")
    recipe, node = recipes[name], compose(name)
    lines = [name, "", recipe.summary, ""]
    lines += [f"{key}: {text}\n" for key, text in recipe.fields.items()]
    lines += ["Steps:", *(f"  {line}" for line in _step_lines(node)), "", "Parts:"]
    lines += [f"  {key}: {_class(value)}{_shown(value)}" for key, value in _used_parts(node).items()]
    return "\n".join([*lines, "", recipe.command or f"python -m align_loop +experiment={name}"])


def compose(name: str) -> dict[str, Any]:
    """The recipe's configuration in the default setting."""
    return compose_node([f"+experiment={name}"])


def parts_of(node: dict[str, Any]) -> str:
    """The parts that make a recipe, in a few words."""
    return ", ".join(
        f"{key} {_class(value)}" for key, value in _used_parts(node).items() if key not in ("evaluator", "sampler")
    )


def _used_parts(node: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The parts that some step of the recipe uses."""
    steps = [*node["schedule"]["before"], *node["schedule"]["iteration"]]
    own = any("on_policy" in step["data"] for step in steps)
    pairs = any("demonstrations" not in step["data"] and step.get("role", "policy") == "policy" for step in steps)
    used = {key: node[key] for key in ("sampler", "annotator", "builder") if own}
    used |= {"objective": node["objective"]} if pairs else {}
    if any(step.get("role") == "reward_model" for step in steps):
        used["reward_model"] = node["reward_model"]
    if node["noise"].get("action") != "none" and any(step.get("noise") for step in steps):
        used["noise"] = node["noise"]
    standard = compose_node([])["shapers"]
    used |= {f"shaper {k}": v for k, v in node["shapers"].items() if v is not None and v != standard.get(k)}
    return used | {"evaluator": node["evaluator"]}


def _step_lines(node: dict[str, Any]) -> list[str]:
    lines = []
    loop = f"{node['loop']['iterations']} x "
    for times, steps in (("", node["schedule"]["before"]), (loop, node["schedule"]["iteration"])):
        for step in steps:
            trained = f"trains the {step.get('role', 'policy').replace('_', ' ')} on {' + '.join(step['data'])}"
            own = [f"{key}: {_class(step[key])}" for key in ("annotator", "builder", "objective") if step.get(key)]
            lines.append(f"{times}{step['name']}: {trained}" + (f" ({', '.join(own)})" if own else ""))
    return lines


def _class(node: Any) -> str:
    return node["_target_"].rpartition(".")[2]


def _shown(node: dict[str, Any]) -> str:
    values = ", ".join(f"{k}={v}" for k, v in node.items() if k != "_target_" and not isinstance(v, dict))
    return f" ({values})" if values else ""


def _short(paper: str) -> str:
    """The citation up to its year."""
    found = re.match(r".*?\b\d{4}\b", paper)
    return found.group() if found else paper
