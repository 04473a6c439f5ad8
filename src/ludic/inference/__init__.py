"""Generation by a vLLM server. A folder tells in which process its code runs."""
