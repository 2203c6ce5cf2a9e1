"""Quality on held-out data, paired against the teacher."""
