"""What can be pruned in a model: its blocks, their masks, the cut. Knows no APTModel."""
