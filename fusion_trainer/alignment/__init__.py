"""Positions and vocabularies of any source onto the pivot's."""
