"""Latency, memory and energy of an artifact on this machine."""
