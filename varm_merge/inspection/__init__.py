"""The weights of a merge without the merge, as tables, a page and a picture."""
