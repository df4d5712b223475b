"""Families of generators, one file each, with what sampling and fine-tuning need to know about the family."""
