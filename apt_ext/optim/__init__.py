"""Resize Parameters together with their optimizer state, and refuse a step that no longer fits."""
