"""Where metrics go; the only place that imports W&B."""
