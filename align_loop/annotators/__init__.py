"""How good each answer is, as raw scores."""
