"""fintune: finance instruction data in, a LoRA adapter that can be trusted out."""

__version__ = "0.2.0"
