"""What the loss is: pure functions on tensors."""
