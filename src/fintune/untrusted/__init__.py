"""Checks of folders made by others: releases, adapters and bases.

`static` reads bytes and imports neither torch nor transformers; `probe` runs transformers and peft
in a forked child with limits. A folder that passes may be loaded by its path. SECURITY.md states
what this guarantees.
"""
