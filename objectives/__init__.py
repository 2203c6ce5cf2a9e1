"""What a candidate is judged by: quality on text, latency, memory and bytes, each with unit, interval and provenance."""
