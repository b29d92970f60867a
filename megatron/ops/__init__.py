"""Operators that may have more than one implementation."""
