"""The kinds of tasks, one module each: what a task asks, what it needs, what comes back, and what that changes in the study."""
