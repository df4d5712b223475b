"""Synthesis methods, one file each: they make images by optimisation or assembly instead of sampling."""
