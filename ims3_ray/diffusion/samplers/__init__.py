"""Samplers, one file each: each turns noise into a clean latent step by step."""
