"""Files on any storage, the hub, Parquet, and artifacts."""
