"""Figures, HTML report, dataset card."""
