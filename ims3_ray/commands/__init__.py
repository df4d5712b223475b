"""The commands that the scripts of ``jobs/`` run."""
