"""Tasks: what the loss and the metrics of a problem are."""
