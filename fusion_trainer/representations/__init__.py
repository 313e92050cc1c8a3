"""The top-k next-token distributions of a model over the dialogues, and the folder that keeps them."""
