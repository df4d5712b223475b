"""The training loops. Each runs alone on a machine that has PyTorch and no Ray; Ray Train wraps them for clusters."""
