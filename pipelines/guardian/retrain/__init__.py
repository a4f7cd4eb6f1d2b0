"""The kind `retrain`: its plan, its checks and its gate."""
