"""Inference with a release: terminal chat, OpenAI-compatible server, page to compare with base."""
