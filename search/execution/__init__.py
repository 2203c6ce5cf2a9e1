"""Running a search: its workers, Ray Tune, processes, and how it ends."""
