"""Speed and memory beside TRL, and cost as work grows: see docs/performance.md. Not part of the package."""
