"""Argument checks, error words and small helpers that every room uses."""
