"""Settings of config.json that say what a forward pass returns, not what it computes.

Training leaves them on (`output_router_logits`), and they would hand our code tuples, or outputs
that packed experts do not have.
"""

from __future__ import annotations

from typing import Any

PLAIN = {
    "return_dict": True,
    "output_router_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
}


def with_plain_outputs(config: Any) -> Any:
    """A config of transformers, changed: a forward pass returns an object with logits alone."""
    for name, value in PLAIN.items():
        if getattr(config, name, value) != value:
            setattr(config, name, value)
    for name in getattr(config, "sub_configs", ()):
        if getattr(config, name, None) is not None:
            with_plain_outputs(getattr(config, name))
    return config
