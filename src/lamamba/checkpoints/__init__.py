"""Checkpoints: their format, finding and writing them, and foreign formats."""
