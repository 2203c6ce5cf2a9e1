"""Who may talk to the service, and how much."""
