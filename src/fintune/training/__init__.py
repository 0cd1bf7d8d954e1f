"""Stage `train`: prepared data in, the best adapter out, through transformers' Trainer."""
