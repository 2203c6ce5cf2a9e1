"""Pictures of fronts, targets and profiles."""
