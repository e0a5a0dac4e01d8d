"""Two models, or one model twice: sparse drafts with dense verification, and what a small draft says about a prompt."""

from .draft import Compressed, compress_prompt, guess, look_ahead
from .loop import Stats, generate

__all__ = ["Compressed", "Stats", "compress_prompt", "generate", "guess", "look_ahead"]
