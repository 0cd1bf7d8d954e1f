"""The adapter leaves the house only with proof: bundle, card, gate, verify, export."""
