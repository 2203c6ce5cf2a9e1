"""An artifact's ONNX graph in torch."""
