"""Experiments around the pruning core: models, data sets, runs and their reports."""
