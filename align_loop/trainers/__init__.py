"""Training of a role: thin adapters over TRL (the only place that imports it)."""

import os

# The hub client reads it when it is first imported, and TRL would report every trainer that it builds.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
