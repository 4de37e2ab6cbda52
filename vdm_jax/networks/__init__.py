"""Flax (linen) networks. They import no equation, and no equation imports them: they meet as callables."""
