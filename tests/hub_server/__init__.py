"""A Hub on loopback for tests: the protocol of the real one as far as huggingface_hub and hf_xet speak it.

Standard library only, everything in memory. `HubServer` runs it in a thread; point the unmodified client at it with
`HF_ENDPOINT=server.url` and a token of `server.hub.accounts`.
"""

from .server import HubServer

__all__ = ["HubServer"]
