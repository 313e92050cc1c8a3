"""Representations that the authors of FuseLLM and FuseChat published, read into stores."""
