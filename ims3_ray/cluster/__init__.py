"""Joining a Ray cluster, waiting for its capacity, running jobs off its head node, and its hardware and speed."""
