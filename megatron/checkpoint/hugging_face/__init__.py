"""Checkpoints in Hugging Face's format: files, configurations, and the maps of five architectures.

Read `architecture` first, which says what a map consists of, then `bert` for one.
"""
