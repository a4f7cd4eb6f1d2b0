"""The APIs of repositories, retraining, feedback and webhooks."""
