"""People's feedback on answers, and its use as training data."""
