"""ONNX models on ONNX Runtime: the checks before a file is opened, its signature, and the engine."""
