"""From a model and a budget to a plan: criteria, budgets, repair, and `prune`, which does it all."""
