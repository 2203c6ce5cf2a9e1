"""From a student in torch to the folder that ships. It needs torch and onnx."""
