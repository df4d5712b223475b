"""The Ray layer: schedules, stores and retries; holds no formula."""
