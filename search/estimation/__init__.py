"""What candidates and work are expected to give and to cost, from what the study knows so far."""
