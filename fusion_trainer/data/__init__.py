"""Stage 1, prepare: chat data to dialogues."""
