"""Use an adapter: a terminal chat, an OpenAI-compatible server, a page that compares with base."""
