"""Image sources, class tables, transforms."""
