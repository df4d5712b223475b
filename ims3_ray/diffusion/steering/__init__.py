"""Steerings of sampling, one file each: they use real images to set the start of sampling or to guide its steps."""
