"""The kinds of job that do the work of the product. They know no HTTP."""
