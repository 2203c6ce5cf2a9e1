"""The search: the store (truth), the sampler, the Ray executor, the budget, the front and the recommendation."""
