"""From a model and a method to something that runs elsewhere: a module, a folder, ONNX."""

from tokenenv._agents import require_own_agents

require_own_agents()
