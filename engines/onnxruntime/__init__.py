"""ONNX Runtime, and onnxruntime-genai for text."""
