"""Measuring on another machine: the agent's server and its client."""
