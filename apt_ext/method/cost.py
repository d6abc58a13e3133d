"""What blocks cost, under its public name."""

from ..pruning.cost import Cost, Latency, Products, budget_cost, channels, cost_of, density_of

__all__ = ["Cost", "Latency", "Products", "budget_cost", "channels", "cost_of", "density_of"]
