"""From a model and a method to something that runs elsewhere: a module, a folder, ONNX."""
