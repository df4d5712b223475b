"""Searches: Ray Tune tries what costs a pool, each pool answers for all settings of selection."""
