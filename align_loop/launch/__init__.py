"""How a stage is run: inline or as a process of its own."""
