"""The report: one self-contained page of a study or a profile."""
