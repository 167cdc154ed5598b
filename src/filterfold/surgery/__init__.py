"""From a plan to a smaller network, proven: cut, mask, verify, save."""
