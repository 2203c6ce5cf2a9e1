"""What is due next and what it costs: the director and what it decides by. No Ray, no torch."""
