"""Who does the work that the director hands out: for a decoder, for a plug-in's module, or simulated."""
