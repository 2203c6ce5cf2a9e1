"""An artifact's ONNX graph in OpenVINO."""
