"""One module for each notebook, what it computes beside the engine and its figures; and what they share."""
