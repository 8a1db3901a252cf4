"""Data, tasks, the training loop and its command line."""
