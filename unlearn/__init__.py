"""Become the model that never saw the data.  Empty so far."""
