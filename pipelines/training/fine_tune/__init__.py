"""The kind `fine_tune`: the job, and the recipe that also runs without it."""
