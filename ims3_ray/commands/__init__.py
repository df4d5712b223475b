"""The commands of ``ims3``."""
