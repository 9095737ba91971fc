"""Are the influences true? Retraining as the judge of any scorer."""
