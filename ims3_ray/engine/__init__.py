"""Stages, their keys, and the code that runs them. Nothing here depends on a particular kind of stage."""
