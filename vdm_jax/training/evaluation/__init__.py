"""What is computed from a trained model: likelihood, sample quality, samples and their plots."""
