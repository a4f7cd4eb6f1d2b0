"""The HTTP server: the application, its routes, and the engines that run models."""
