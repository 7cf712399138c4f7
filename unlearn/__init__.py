"""Become the model that never saw the data.  Its parts are used from Python; the command is to come."""
