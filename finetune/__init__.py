"""Fine-tuning and DPO for Qwen2-family models on PaddlePaddle."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["AutoModelForCausalLM", "AutoTokenizer"]


def __getattr__(name: str) -> Any:
    """Load the quickstart's classes when they are asked for: `import finetune` stays light."""
    if name in __all__:
        from finetune.infer import auto

        return getattr(auto, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
