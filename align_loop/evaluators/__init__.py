"""Whether it is getting better, and whether anything goes wrong."""
