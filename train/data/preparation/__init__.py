"""Prepares datasets from files, measures them, and opens those that are prepared."""
