"""The training loops. They need PyTorch but not Ray; on a cluster they run under Ray Train."""
