"""The service: searches, recommendations and comparisons by HTTP and in a browser."""
