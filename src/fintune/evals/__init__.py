"""Evaluation: base against adapter on rows that training never saw, and a verdict with proof."""
