"""Objectives of fine-tuning, one file each. They take and return tensors."""
