"""The embedded demo: a small world made from a seed, and the public stages run on it."""
