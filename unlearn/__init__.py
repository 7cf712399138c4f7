"""Become the model that never saw the data.  Nothing is here yet."""
