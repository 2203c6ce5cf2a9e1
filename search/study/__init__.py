"""A study on disk: its database, its records, and views of it."""
