"""How salient a block is."""
