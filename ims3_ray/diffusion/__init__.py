"""Noise schedule, guided sampling, inversion. Tensors in, tensors out."""
