"""From a study to one candidate: limits, comparisons between targets, export."""
