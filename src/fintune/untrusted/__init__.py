"""Folders made by others: everything that is read from a release, an adapter or a base.

First the static checks (`static`), which import neither torch nor transformers; then, in one
forked child with limits, what only transformers and peft can say (`probe`). What passes may be
loaded by path; SECURITY.md says what that promises.
"""
