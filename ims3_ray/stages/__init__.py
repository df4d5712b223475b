"""The stages of a plan: they schedule work on Ray, store its results and retry failures, and contain no formulas."""
