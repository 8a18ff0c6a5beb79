"""Verified fakes for tests of this package and of programs built on it."""
