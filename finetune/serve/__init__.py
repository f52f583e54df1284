"""The HTTP server with OpenAI's interface: protocol, scheduler, tool calls, metrics."""
