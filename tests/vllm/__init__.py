"""The plugin for vLLM. `python -m tests.vllm.run` runs what needs vLLM; the rest needs none."""
