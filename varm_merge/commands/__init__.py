"""The commands of ``varm-merge``, one file each. They import what they need when they run."""
