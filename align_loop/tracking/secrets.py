"""What must not leave the machine with a configuration: keys, tokens and passwords."""

from __future__ import annotations

import re
from typing import Any

_SECRET_WORDS = {"secret", "secrets", "password", "passwd", "passphrase", "pwd", "credential", "credentials", "apikey"}
_SECRET_LAST = {"key", "keys", "token", "auth", "bearer"}
_VOCABULARY = {"bos", "eos", "pad", "unk", "sep", "cls", "mask", "special", "added"}  # eos_token is no secret
# Values that are secrets whatever their name: hub, OpenAI and W&B keys, and passwords inside URLs.
_SECRET_VALUE = re.compile(r"\b(hf_|sk-|wandb_v\d_|gh[pousr]_)[A-Za-z0-9_-]{16,}|://[^/\s:@]+:[^/\s@]+@")


def without_secrets(value: Any) -> Any:
    """``value`` (JSON-like) without the entries that look like a key, token or password.

    It errs on the side of leaving out: a harmless ``sort_key`` goes too, ``max_tokens`` and ``eos_token`` stay.
    """
    if isinstance(value, dict):
        kept = {str(k): v for k, v in value.items() if not (_secret_name(str(k)) or _secret_value(v))}
        return {k: without_secrets(v) for k, v in kept.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(item) for item in value if not _secret_value(item)]
    return value


def _secret_name(name: str) -> bool:
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)]
    if not words:
        return False
    last_is_secret = words[-1] in _SECRET_LAST and not (len(words) > 1 and words[-2] in _VOCABULARY)
    return last_is_secret or bool(_SECRET_WORDS & set(words))


def _secret_value(value: Any) -> bool:
    return isinstance(value, str) and _SECRET_VALUE.search(value) is not None
