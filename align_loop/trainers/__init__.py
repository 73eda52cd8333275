"""Training of a role: thin adapters over TRL (the only place that imports it)."""
