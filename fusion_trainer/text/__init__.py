"""Texts through any tokenizer: token ids, and the byte at which each token ends."""
