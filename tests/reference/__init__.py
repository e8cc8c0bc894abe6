"""Slow, loop-written equations that the tests hold the vectorised code against."""
