"""align_loop: align a language model with very few human labels, in a loop of remembered stages."""

__version__ = "0.1.0"
