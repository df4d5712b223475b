"""Searches: Ray Tune tries the settings that each need their own candidate pool; a pool serves all settings of selection."""
