"""Whole training steps: forward and backward as one CUDA graph."""
