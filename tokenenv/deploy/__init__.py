"""A model and a method as one module, as a folder on disk, and as an ONNX file."""

from tokenenv._agents import require_own_agents

require_own_agents()
