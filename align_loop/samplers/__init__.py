"""Which answers are drawn, and from which role."""
