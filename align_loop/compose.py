"""From a command line to a checked configuration, through Hydra, with errors of one line."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from align_loop.config import Config, default_run_dir, from_node
from align_loop.errors import UserError
from align_loop.parts import nearest


def conf_dir() -> Path:
    """``conf/``: inside the package where it was installed from a wheel, beside it in a checkout."""
    package = Path(str(files("align_loop")))
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise UserError(f"no configuration folder beside {package}: install the package again")


def load(overrides: list[str]) -> tuple[Config, dict[str, Any]]:
    """The checked configuration of ``overrides`` and its resolved form as plain values.

    ``+NAME`` without a value is short for ``+NAME=default`` (``+lora``). Raises ``UserError``.
    """
    for override in overrides:
        if not re.match(r"\+\w+$|~|[^=]+=", override):
            raise UserError(f"{override}: write it as key=value; a command (run, plan, show, recipes) comes first")
    node = compose_node([f"{o}=default" if re.fullmatch(r"\+\w+", o) else o for o in overrides])
    return from_node(node), node


def compose_node(overrides: list[str]) -> dict[str, Any]:
    """What Hydra composes from ``conf/`` and ``overrides``, resolved; ``UserError`` where it can't."""
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            composed = _compose(overrides)
        if missing := sorted(OmegaConf.missing_keys(composed)):
            needed = f": setting={composed.setting.name} needs it" if missing[0].startswith("setting.") else ""
            raise UserError(f"{missing[0]} is missing{needed}; add {missing[0]}=...")
        if composed.run_dir is None:
            composed.run_dir = default_run_dir(OmegaConf.to_container(composed, resolve=False))
        return OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException, FileNotFoundError) as error:
        raise UserError(_explain(error, overrides)) from None


def _compose(overrides: list[str]) -> DictConfig:
    """Hydra's composition; a key that its group's file leaves out is added, for the part's own fields to accept."""
    try:
        return compose("config", overrides)
    except ConfigCompositionException as error:
        found = re.match(r"Could not override '((\S+)\.[^.]+)'\.\nTo append", str(error))
        if not found:
            raise
        key, group = found.groups()
        others = [o for o in overrides if o.partition("=")[0] != key]
        if not OmegaConf.is_dict(OmegaConf.select(_compose(others), group)):
            raise
        return _compose([f"+{o}" if o.partition("=")[0] == key else o for o in overrides])


def _explain(error: Exception, overrides: list[str]) -> str:
    """One line for Hydra's message of several, naming the key, the value and the nearest right ones."""
    text = str(error)
    if found := re.search(r"Could not (?:override|append to config\. An item is already at|find) '([^']+)'", text):
        key = found.group(1)
        if added := re.search(r"To append to your default list use (\S+)", text):
            return f"{added.group(1)[1:]}: nothing of that group is chosen yet; did you mean {added.group(1)}?"
        if "/" in key or "Available options in" in text:
            return _unknown_option(key, text)
        return _unknown_key(key, overrides)
    if "Available options in" in text:
        return _unknown_option(text.split("'")[1] if "'" in text else "", text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    override = getattr(error, "override", None)  # of one that Hydra can't read
    return f"{override or 'configuration'}: " + " ".join(lines[: 1 if override else 2])[:300]


def _unknown_option(key: str, text: str) -> str:
    listed = text.split("Available options in", 1)[-1].split("Config search path", 1)[0]
    options = [line.strip() for line in listed.splitlines()[1:] if line.strip()]
    group, _, name = key.rpartition("/")
    return f"{group or 'option'}={name}: no such configuration; {nearest(name, options)}"


def _unknown_key(key: str, overrides: list[str]) -> str:
    value = next((o.partition("=")[2] for o in overrides if o.lstrip("+~").partition("=")[0] == key), "")
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        kept = [o for o in overrides if o.lstrip("+~").partition("=")[0] != key]
        try:
            known = _leaves(compose("config", kept))
        except HydraException:
            known = _leaves(compose("config"))
    last = key.rpartition(".")[2]
    same = [k for k in known if k.rpartition(".")[2] == last]
    hint = f"did you mean {' or '.join(same[:2])}?" if same else nearest_key(key, known)
    return f"{key}={value}: unknown key; {hint}"


def nearest_key(key: str, known: list[str]) -> str:
    """The nearest keys of the same group, or of all where that group does not exist."""
    group = key.rpartition(".")[0]
    siblings = [k for k in known if k.rpartition(".")[0] == group]
    return nearest(key, siblings or known) if siblings else nearest(key, {k.partition(".")[0] for k in known})


def _leaves(node: Any, prefix: str = "") -> list[str]:
    """The dotted names of all keys of a composed configuration."""
    names = []
    for key in node:
        child = node._get_node(key)
        names.append(f"{prefix}{key}")
        if isinstance(child, DictConfig) and not child._is_none():
            names += _leaves(child, f"{prefix}{key}.")
    return names
