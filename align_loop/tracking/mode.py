"""Whether W&B is used online, offline or not at all, found out without importing it and without asking."""

from __future__ import annotations

import configparser
import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

from align_loop.errors import UserError

MODES = ("auto", "online", "offline", "off")


def resolve_mode(mode: str) -> str:
    """The configured ``mode`` as one of "online", "offline" and "off".

    "auto" obeys ``WANDB_MODE`` and is else online where a key is configured, offline where none is.
    "online" without a key raises ``UserError``: W&B would stop and ask for one.
    """
    if mode not in MODES:
        raise UserError(f"wandb mode {mode!r} is not known; choose one of {', '.join(MODES)}")
    if mode == "auto":
        wish = {"disabled": "off", "offline": "offline", "dryrun": "offline"}.get(os.environ.get("WANDB_MODE", ""))
        return wish or ("online" if has_key() else "offline")
    if mode == "online" and not has_key():
        raise UserError("wandb mode 'online' but no key found; run 'wandb login', set WANDB_API_KEY, or take 'offline'")
    return mode


def has_key() -> bool:
    """True where W&B would find a key by itself: environment, settings file, or netrc entry for its server."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    settings = _settings()
    if settings.get("api_key"):
        return True
    base_url = os.environ.get("WANDB_BASE_URL") or settings.get("base_url") or "https://api.wandb.ai"
    return _in_netrc(urlsplit(base_url).netloc)


def _settings() -> dict[str, str]:
    folder = os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb"
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(Path(folder).expanduser() / "settings")
        return dict(parser["default"]) if parser.has_section("default") else {}
    except (configparser.Error, OSError):
        return {}  # W&B complains about its own broken file when it is used


def _in_netrc(host: str) -> bool:
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        found = netrc.netrc(path).authenticators(host)
    except (netrc.NetrcParseError, OSError):
        return False
    return bool(found and found[2])
