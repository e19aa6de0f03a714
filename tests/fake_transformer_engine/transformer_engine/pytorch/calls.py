"""Every call of attention: (function, positional arguments, keyword arguments)."""

CALLS = []
