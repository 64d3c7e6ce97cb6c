"""What the two servers share: starting a vLLM engine, the link to the router, health and metrics."""
