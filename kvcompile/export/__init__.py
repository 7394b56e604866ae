"""An artifact -> another system: plans for other caches, and whole models as ONNX (`export.onnx`)."""
