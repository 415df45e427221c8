"""Report of pretraining runs: curves, tokens, results and settings as one HTML file and PNGs."""
