"""Corpus and recipe of the embedded demonstration checkpoint."""
