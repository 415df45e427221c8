"""Tasks of one's own: reading, heads, losses, scores, predictions and saved models of each kind."""
