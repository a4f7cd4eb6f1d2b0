"""The dispatcher: claims jobs and gives them to workers."""
