"""A self-hosted server for LLM agents. Start reading in `bamboo/server.py`."""

from typing import Final

__version__: Final = "0.1.0"
