"""The noise schedule, guided sampling and inversion. All functions take and return tensors."""
