"""Which examples stay, and with what soft label, margin, weight and beta."""
