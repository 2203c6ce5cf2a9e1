"""From a student in torch to the folder that ships. `checksums` alone is light; the rest needs torch and onnx."""
