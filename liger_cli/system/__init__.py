"""Errors, signals, outputs that appear whole, untrusted files, and what is said on a terminal."""
