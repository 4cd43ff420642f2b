"""Documents, token streams and windows: the package's own, under the name that the scripts here know."""

from __future__ import annotations

from swapless.oracle.corpus import Document, WindowSampler, domain_texts, read_documents, token_streams

__all__ = ["Document", "WindowSampler", "domain_texts", "read_documents", "token_streams"]
