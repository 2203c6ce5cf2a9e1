"""Compressed weights of a candidate from calibration text: decoders, modules of plug-ins, and the sensitivity table."""
