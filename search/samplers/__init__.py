"""Who proposes the next candidate: Optuna, or the sequential baseline."""
