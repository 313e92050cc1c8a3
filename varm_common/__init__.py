"""Code that ``varm_merge`` and ``fusion_trainer`` share; it imports neither."""
