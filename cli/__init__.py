"""The command line: one thin file per command, options made from the jobs' dataclasses."""
