"""Generation (vLLM, HF generate) and log-prob scoring; the only place that imports vLLM."""
