"""The kind `extract_data`: a commit of a repository as training data."""
