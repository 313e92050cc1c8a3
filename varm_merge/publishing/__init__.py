"""A finished merge on the Hub, with a model card."""
