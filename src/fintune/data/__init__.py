"""Rows in, prepared data out: every row accounted for, nothing leaked, nothing cut in silence."""
