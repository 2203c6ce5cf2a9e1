"""Making students: pruning, distillation, quantization, and the export to what an engine runs."""
