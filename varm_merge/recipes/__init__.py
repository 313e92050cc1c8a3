"""Checks of a recipe: every problem at once, with its line, before weights are read."""
