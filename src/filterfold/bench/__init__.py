"""The comparison harness: trials, recipes, sensitivity, statistics, report."""
