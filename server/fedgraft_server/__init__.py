"""Rounds, aggregation, checkpoints and export."""
