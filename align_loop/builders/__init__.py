"""Which examples come out of scored answers."""
