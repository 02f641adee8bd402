"""qlab: how LLM weights are quantized and fine-tuned, exact and small enough to read."""
