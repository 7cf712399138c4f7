"""Embedding and head: whether they stay one table, on which grids, and what that weighs."""
