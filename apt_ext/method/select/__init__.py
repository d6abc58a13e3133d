"""Which blocks stay and which ranks grow, under a budget."""
