"""Training objectives. Tensors in, tensors out."""
